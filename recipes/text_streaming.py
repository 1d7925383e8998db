"""Training batches from a corpus that does not fit into memory.

The training documents are read one after another, over and over, and cut into blocks of windows;
the windows of a block are shuffled. A position is where a block starts in the corpus (pass, file,
row, token) and how many batches of it were handed over: enough to read the block again, so a run
resumes exactly.

Every rank reads and tokenizes the whole stream and takes its share of each block. So all ranks
have the same position and the same number of batches, at the price of tokenizing on each of them:
for a costly tokenizer on many processes tokenize beforehand, or hold the corpus in memory.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from longnet_zoo.tokenizers import Tokenizer

from .loader import EndlessLoader, batch_iterator
from .text_corpus import Document, read_documents
from .text_files import SourceFile
from .text_loader import Batch, Collate
from .text_packing import DocumentEncoder

__all__ = ["StreamLoader", "StreamPosition", "StreamingConfig", "StreamingWindows"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamingConfig:
    """How to stream a corpus.

    Attributes:
        batches_per_epoch: Batches that Lightning takes for an epoch.
        shuffle_windows: Windows that are held and shuffled together, at least.
        eval_tokens: Tokens of held-out text that validation and test use, at most: the front of
            the held-out documents. Without `val_source` about `eval_tokens / val_fraction` tokens
            of text are read to find them before training starts.
        max_document_bytes: Text files longer than this, in bytes, are cut into documents of about
            this size at line ends. No more of a file is held, so it may be larger than memory.
    """

    batches_per_epoch: int = 1000
    shuffle_windows: int = 256
    eval_tokens: int = 4_194_304
    max_document_bytes: int = 8_388_608

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamPosition:
    """Where a stream goes on.

    Attributes:
        corpus_pass: How often the corpus has been read, counted from 0.
        file: Place of the file in the order of this pass.
        row: Row in the file of the document that the block starts in.
        token: Token of that document that the block starts at.
        block: Number of the block, counted from 0 over all passes.
        batch: Batches of the block that were handed over.
    """

    corpus_pass: int = 0
    file: int = 0
    row: int = 0
    token: int = 0
    block: int = 0
    batch: int = 0


@dataclasses.dataclass(kw_only=True)
class _Piece:
    """A tokenized document and where it was found."""

    corpus_pass: int
    file: int
    row: int
    tokens: np.ndarray


class StreamingWindows(IterableDataset[tuple[Batch, dict[str, int]]]):
    """Yields batches without end, each with the position behind it.

    Args:
        files: Files of the corpus.
        read_options: Options for `read_documents`.
        is_train: Whether the document of a key belongs to the training split.
        tokenizer: Makes the ids.
        collate: Makes a batch of windows.
        seq_len: Context in tokens, the distance between windows.
        window_size: Tokens of a window.
        batch_size: Windows in a batch, for each rank.
        block_size: Windows shuffled together, at least; rounded up to whole steps.
        seed: Seed of the order.
        shuffle_files: Whether each pass takes the files in another order.
        rank: Number of this process.
        world_size: Number of processes that share a block.
    """

    def __init__(
        self,
        files: Sequence[SourceFile],
        *,
        read_options: dict[str, Any],
        is_train: Callable[[str], bool],
        tokenizer: Tokenizer,
        collate: Collate,
        seq_len: int,
        window_size: int,
        batch_size: int,
        block_size: int,
        seed: int,
        shuffle_files: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.position = StreamPosition()
        self._files = list(files)
        self._read_options = read_options
        self._is_train = is_train
        self._tokenizer = tokenizer
        self._collate = collate
        self._seq_len = seq_len
        self._window_size = window_size
        self._batch_size = batch_size
        self._stride = batch_size * world_size
        self._batches_per_block = -(-block_size // self._stride)
        self._seed = seed
        self._shuffle_files = shuffle_files
        self._first = rank * batch_size
        self.order = {
            "seq_len": seq_len,
            "batch_size": batch_size,
            "world_size": world_size,
            "seed": seed,
            "shuffle_files": shuffle_files,
            "block_size": block_size,
            "max_document_bytes": read_options.get("max_document_bytes"),
        }

    def __iter__(self) -> Iterator[tuple[Batch, dict[str, int]]]:
        """Goes on from `position`."""
        for start, end, windows in self._blocks():
            order = np.random.default_rng([self._seed, start.block]).permutation(len(windows))
            for batch in range(start.batch, self._batches_per_block):
                first = batch * self._stride + self._first
                chosen = order[first : first + self._batch_size]
                seeds = [(self._seed, 0, start.block, int(window)) for window in chosen]
                is_last = batch + 1 == self._batches_per_block
                after = end if is_last else dataclasses.replace(start, batch=batch + 1)
                yield (
                    self._collate(windows[chosen], mask_seeds=seeds),
                    dataclasses.asdict(after),
                )

    def _blocks(self) -> Iterator[tuple[StreamPosition, StreamPosition, np.ndarray]]:
        """Yields where a block starts, where the next one does, and its windows."""
        start = self.position
        num_windows = self._batches_per_block * self._stride
        step = num_windows * self._seq_len
        needed = step + self._window_size - self._seq_len
        documents = self._documents()
        held: list[_Piece] = []
        num_held = -start.token
        while True:
            while num_held < needed:
                held.append(next(documents))
                num_held += len(held[-1].tokens)
            stream = np.concatenate([piece.tokens for piece in held])[start.token :]
            views = np.lib.stride_tricks.sliding_window_view(stream, self._window_size)
            windows = views[: step : self._seq_len]

            skipped = start.token + step
            while skipped >= len(held[0].tokens):
                skipped -= len(held.pop(0).tokens)
                if not held:
                    held.append(next(documents))
            end = StreamPosition(
                corpus_pass=held[0].corpus_pass,
                file=held[0].file,
                row=held[0].row,
                token=skipped,
                block=start.block + 1,
            )
            yield start, end, windows
            start, num_held = end, sum(len(piece.tokens) for piece in held) - skipped

    def _documents(self) -> Iterator[_Piece]:
        """Yields tokenized training documents from `position` on, without end."""
        place = (self.position.file, self.position.row)
        corpus_pass = self.position.corpus_pass
        while True:
            is_whole = place == (0, 0)
            num_tokens = 0
            for piece in self._one_pass(corpus_pass, place):
                num_tokens += len(piece.tokens)
                yield piece
            if is_whole and num_tokens < self._window_size:
                raise ValueError(
                    f"the training documents must fill a window of {self._window_size:,} tokens, "
                    f"got {num_tokens:,} tokens in {len(self._files)} files. Shorten seq_len, add "
                    "text, or lower val_fraction and test_fraction."
                )
            place, corpus_pass = (0, 0), corpus_pass + 1

    def _one_pass(self, corpus_pass: int, start: tuple[int, int]) -> Iterator[_Piece]:
        files = self._files
        if self._shuffle_files:
            rng = np.random.default_rng([self._seed, 1, corpus_pass])
            files = [files[i] for i in rng.permutation(len(files))]
        encoder = DocumentEncoder[Document](self._tokenizer)
        for document in read_documents(files, start=start, **self._read_options):
            if self._is_train(document.key):
                yield from _pieces(encoder.add(document, document.text), corpus_pass)
        yield from _pieces(encoder.finish(), corpus_pass)


def _pieces(documents: list[tuple[Document, np.ndarray]], corpus_pass: int) -> list[_Piece]:
    return [
        _Piece(corpus_pass=corpus_pass, file=found.file_index, row=found.row, tokens=tokens)
        for found, tokens in documents
    ]


class StreamLoader(EndlessLoader):
    """Yields the batches of a stream; an epoch is a number of batches, chosen freely.

    Args:
        dataset: Stream of batches and positions.
        num_batches: Batches of an epoch.
        num_workers: 0 reads in this process, 1 in a process beside it.
        pin_memory: Whether batches go to page-locked memory.
        corpus: Name of the text, to notice when a checkpoint comes from another one.
    """

    def __init__(
        self,
        dataset: StreamingWindows,
        *,
        num_batches: int,
        num_workers: int = 0,
        pin_memory: bool = False,
        corpus: str = "",
    ) -> None:
        super().__init__(
            num_batches=num_batches,
            position=dataclasses.asdict(dataset.position),
            order={"corpus": corpus, **dataset.order},
        )
        self._dataset = dataset
        self._workers: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory}

    def _open(self) -> Iterator[tuple[Batch, dict[str, int]]]:
        self._dataset.position = StreamPosition(**self._position)
        return batch_iterator(self._dataset, None, **self._workers)

    def _step(self, item: tuple[Batch, dict[str, int]]) -> tuple[Batch, dict[str, int]]:
        batch, position = item
        return batch, position
