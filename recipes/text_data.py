"""Text for language models: real source code by default, any text otherwise.

Documents are found (`text_files`), read and split (`text_corpus`), turned into ids (`tokenizers`),
packed into streams of tokens (`text_packing`, `text_splits`) and handed out as batches of windows
of `seq_len` tokens that resume exactly (`text_loader`; `text_streaming` for a corpus larger than
memory).

A batch is a dict; b is `batch_size`, n is `seq_len`:

- `tokens` (b, n) int64;
- `labels` (b, n) int64: for "causal" the token that follows each one, for "masked" the hidden
  token itself; -100 where there is no loss;
- with `confine_to_document` both are (1, b * n), and `cu_seqlens` (num_sequences + 1,) int32 holds
  the boundaries of documents and of windows.

Held-out text is whole documents, chosen by a hash of their path, that training never sees.
"""

import functools
from typing import Any, Literal

import lightning as L
import torch

from longnet_zoo.tokenizers import load_tokenizer

from .data_options import check_fractions, check_least
from .data_ranks import data_rank
from .text_corpus import Corpus, CorpusSummary, Split
from .text_loader import EvalLoader, TrainLoader
from .text_packing import Objective, PackedDocuments, collate, window_size
from .text_splits import SplitReader
from .text_streaming import StreamingConfig, StreamingWindows, StreamLoader

__all__ = ["TextDataModule"]


class TextDataModule(L.LightningDataModule):
    """Serves windows of packed documents for causal or masked language modelling.

    Args:
        source: "stdlib" (the Python standard library's source), "python" (that and the installed
            torch, sympy, networkx, numpy and lightning), a folder, a file, a glob, or a list of
            these. Tables are .jsonl and .parquet; any other file is one document.
        val_source: Validation documents; null holds out `val_fraction` of `source`.
        test_source: Test documents; null holds out `test_fraction` of `source`.
        pattern: Glob of the files to take, relative to each folder, such as "**/*.f90"; what it
            matches is read whatever its suffix. null takes the known text suffixes.
        column: Column of tables that holds the text.
        val_fraction: Share of documents held out for validation; 0 for no validation.
        test_fraction: Share of documents held out for the test.
        split: "hash" holds out whole documents by a hash of their path; "tail" holds out the end
            of the token stream, for a source of few documents.
        on_error: "skip" logs files that cannot be read and goes on; "raise" stops at them.
        tokenizer: "bytes", or the path of a tokenizer.json or of its folder.
        eod_token: Token that ends a document; null looks for a common name in the tokenizer.json.
        mask_token: Token that hides others; null looks for a common name.
        pad_token: Token that fills up; null looks for a common name.
        seq_len: Context in tokens.
        batch_size: Windows in a batch, on each device.
        objective: "causal" predicts the next token, "masked" hidden tokens as in BERT.
        mask_probability: Share of tokens to predict for "masked", null for 0.15; of these 80 % are
            masked, 10 % replaced at random and 10 % left alone.
        confine_to_document: Whether batches carry the boundaries of documents, so that attention
            stays within a document, and no label asks for the start of the next one.
        shuffle_documents: Whether documents change their order every epoch. By default they stay
            in path order, so that a window shows files of one package together, and only the
            windows are shuffled. When streaming it shuffles the files.
        seed: Seed of order, offsets and masks.
        num_workers: Processes that prepare batches; 0 prepares them in the training process,
            which is enough for data in memory. At most 1 when streaming.
        streaming: true, or how to stream: the training text is then read again and again instead
            of being held in memory, and duplicates in it are not dropped.

    Raises:
        ValueError: An option is out of range, the source or the tokenizer cannot be read, or the
            text is too short for the context.
    """

    def __init__(
        self,
        *,
        source: list[str] | str = "stdlib",
        val_source: list[str] | str | None = None,
        test_source: list[str] | str | None = None,
        pattern: str | None = None,
        column: str = "text",
        val_fraction: float = 0.1,
        test_fraction: float = 0.05,
        split: Literal["hash", "tail"] = "hash",
        on_error: Literal["skip", "raise"] = "skip",
        tokenizer: str = "bytes",
        eod_token: str | None = None,
        mask_token: str | None = None,
        pad_token: str | None = None,
        seq_len: int = 8192,
        batch_size: int = 1,
        objective: Objective = "causal",
        mask_probability: float | None = None,
        confine_to_document: bool = False,
        shuffle_documents: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        streaming: bool | StreamingConfig = False,
    ) -> None:
        super().__init__()
        self.source, self.split = source, split
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.seq_len, self.batch_size, self.objective = seq_len, batch_size, objective
        self.mask_probability, self.confine_to_document = mask_probability, confine_to_document
        self.shuffle_documents, self.seed, self.num_workers = shuffle_documents, seed, num_workers
        self.streaming = StreamingConfig() if streaming is True else streaming or None
        self._check()
        self.tokenizer = load_tokenizer(
            tokenizer, eod_token=eod_token, mask_token=mask_token, pad_token=pad_token
        )
        if objective == "masked" and self.tokenizer.mask_id is None:
            raise ValueError(
                f"objective='masked' needs a mask token, and tokenizer={tokenizer!r} has none of "
                "the common names. Pass mask_token=..., or train with objective='causal'."
            )
        self._reader = SplitReader(
            self.tokenizer,
            corpus_options={
                "source": source,
                "val_source": val_source,
                "test_source": test_source,
                "pattern": pattern,
                "column": column,
                "val_fraction": val_fraction,
                "test_fraction": test_fraction,
                "on_error": on_error,
            },
            is_tail=split == "tail",
            streaming=self.streaming,
        )
        self._packed: dict[Split, PackedDocuments] = {}
        self._train_loader: tuple[L.Trainer | None, TrainLoader | StreamLoader] | None = None

    @property
    def vocab_size(self) -> int:
        """Number of token ids; the model needs as many."""
        return self.tokenizer.vocab_size

    @property
    def token_bytes(self) -> torch.Tensor:
        """Bytes of text that each id stands for, int64, (vocab_size,)."""
        return self.tokenizer.token_bytes

    @property
    def fingerprint(self) -> str:
        """Hash of the text and its splits: bits per byte compare where it is equal."""
        return self._reader.fingerprint

    @property
    def summary(self) -> CorpusSummary | None:
        """Documents and bytes of each split; None before setup and when streaming."""
        return self._reader.summary

    def packed(self, split: Split) -> PackedDocuments:
        """Returns the token stream of a split, reading the corpus if need be.

        Args:
            split: "train", "val" or "test".

        Raises:
            ValueError: The training text is streamed, so it is not held.
        """
        if self.streaming and split == "train":
            raise ValueError(
                "packed('train') holds the training text in memory, got streaming=True. Use "
                "train_dataloader, or streaming=False."
            )
        if split not in self._packed:
            self.setup("test" if split == "test" else "fit")
        if split not in self._packed:
            # Nothing is held out, which is an error that says how to change it.
            self._read([split])
        return self._packed[split]

    def setup(self, stage: str) -> None:
        """Reads what the stage needs, once.

        Args:
            stage: "fit", "validate", "test" or "predict".
        """
        needed: dict[str, tuple[Split, ...]] = {
            "fit": ("train", "val"),
            "validate": ("val",),
            "test": ("test",),
        }
        missing = [
            split
            for split in needed.get(stage, ())
            if split not in self._packed
            and self._reader.has(split)
            and not (self.streaming and split == "train")
        ]
        if missing:
            self._read(missing)

    def train_dataloader(self) -> TrainLoader | StreamLoader:
        """Returns the training batches.

        A trainer that asks again, for its next epoch or its next fit, gets the same loader, which
        goes on where it was.
        """
        trainer = self.trainer
        if self._train_loader is None or trainer is None or self._train_loader[0] is not trainer:
            streaming = self.streaming
            loader = self._stream_loader(streaming) if streaming else self._memory_loader()
            self._train_loader = (trainer, loader)
        return self._train_loader[1]

    def val_dataloader(self) -> EvalLoader | list[Any]:
        """Returns the validation batches; none if nothing is held out."""
        return self._eval_loader("val") if self._reader.has("val") else []

    def test_dataloader(self) -> EvalLoader:
        """Returns the test batches."""
        if not self._reader.has("test"):
            raise ValueError(
                f"the test needs held-out text, got test_fraction={self.test_fraction} and no "
                "test_source. Pass one of them."
            )
        return self._eval_loader("test")

    def _check(self) -> None:
        check_least(
            seq_len=(self.seq_len, 1),
            batch_size=(self.batch_size, 1),
            seed=(self.seed, 0),
            num_workers=(self.num_workers, 0),
        )
        check_fractions(val_fraction=self.val_fraction, test_fraction=self.test_fraction)
        if self.mask_probability is not None and self.objective != "masked":
            raise ValueError(
                f"mask_probability is for objective='masked', got {self.mask_probability} and "
                f"objective={self.objective!r}. Leave it out, or change the objective."
            )
        if self.mask_probability is not None and not 0 < self.mask_probability <= 1:
            raise ValueError(
                f"mask_probability must lie in (0, 1], got {self.mask_probability}; 0.15 is usual."
            )
        if self.streaming and self.num_workers > 1:
            raise ValueError(
                f"num_workers must be 0 or 1 when streaming, got {self.num_workers}: a stream has "
                "one order. Use 1 to read beside the training."
            )
        if self.streaming and self.split == "tail":
            raise ValueError(
                "split='tail' needs the whole text in memory, got streaming=True. Pass "
                "val_source, or use split='hash'."
            )

    def _read(self, splits: list[Split]) -> None:
        self._packed |= self._reader.read(splits, seq_len=self.seq_len, objective=self.objective)

    def _loader_options(self) -> dict[str, Any]:
        """Returns what all loaders take."""
        rank, world_size = data_rank(self.trainer)
        return {
            "collate": functools.partial(
                collate,
                tokenizer=self.tokenizer,
                objective=self.objective,
                confine_to_document=self.confine_to_document,
                mask_probability=self.mask_probability or 0.15,
            ),
            "seq_len": self.seq_len,
            "window_size": window_size(self.seq_len, self.objective),
            "batch_size": self.batch_size,
            "rank": rank,
            "world_size": world_size,
        }

    def _worker_options(self) -> dict[str, Any]:
        return {"num_workers": self.num_workers, "pin_memory": torch.cuda.is_available()}

    def _eval_loader(self, split: Split) -> EvalLoader:
        packed = self.packed(split)
        return EvalLoader(packed, **self._loader_options(), **self._worker_options())

    def _memory_loader(self) -> TrainLoader:
        packed = self.packed("train")
        return TrainLoader(
            packed,
            shuffle_documents=self.shuffle_documents,
            seed=self.seed,
            repeat=getattr(self.trainer, "overfit_batches", 0),
            corpus=self.fingerprint,
            **self._loader_options(),
            **self._worker_options(),
        )

    def _stream_loader(self, config: StreamingConfig) -> StreamLoader:
        corpus = self._reader.open_corpus()
        dataset = StreamingWindows(
            corpus.files["train"],
            read_options={
                "column": corpus.column,
                "on_error": corpus.on_error,
                "max_document_bytes": config.max_document_bytes,
            },
            is_train=functools.partial(_is_train, corpus),
            tokenizer=self.tokenizer,
            block_size=config.shuffle_windows,
            shuffle_files=self.shuffle_documents,
            seed=self.seed,
            **self._loader_options(),
        )
        return StreamLoader(
            dataset,
            num_batches=config.batches_per_epoch,
            corpus=self.fingerprint,
            **self._worker_options(),
        )


def _is_train(corpus: Corpus, key: str) -> bool:
    # A function of the module, so that worker processes can be sent it.
    return corpus.split_of(key) == "train"
