r"""Trains a causal language model on a file of token ids that is never read as a whole.

    python -m recipes.token_file_writer --source python --folder tokens
    torchrun --nproc-per-node 8 -m recipes.token_file fit \
        --config configs/text/sequence_parallel_node.yaml

The file is an array on disk, mapped into memory. Where processes share a sequence
(`recipes.sequence_parallel`), each keeps the tokens of its own part and no others, so that a
sequence may be longer than the memory of any of them. The task is `recipes.text_lm`'s.

With the layouts "contiguous" and "zigzag" a part is one or two stretches of the file, and no more
is read. The tokens of a "striped" part lie all over the window, so that every process makes the
disk read the whole window: to balance causal attention, rather take "zigzag".

A batch is a dict; b is `batch_size`, c the tokens of a part, `seq_len` / processes of a sequence:

- `tokens` (b, c) int64;
- `labels` (b, c) int64: the token that follows each one;
- `is_part`: True where a sequence is shared.
"""

import hashlib
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import Dataset

from longnet_zoo.parallel import Layout, positions_of
from longnet_zoo.tokenizers import load_tokenizer
from recipes.cli import run
from recipes.data_options import check_least
from recipes.data_ranks import data_rank
from recipes.loader import FILLER, EpochOrder, FixedLoader, SeededLoader, fair_order
from recipes.text_lm import TextLM
from recipes.text_packing import IGNORE_INDEX, Objective

__all__ = ["TokenFileDataModule", "TokenWindows", "main", "open_tokens"]


class TokenFileDataModule(L.LightningDataModule):
    """Serves windows of a token file, of which each process reads its part.

    Args:
        train: Token ids for training, one after another: a one-dimensional .npy file, or a raw file
            with `dtype`.
        val: The same for validation; null for none.
        test: The same for the test; null for none.
        dtype: Type of the numbers in raw files, such as "uint16"; null for .npy files, which say.
        tokenizer: What made the ids, "bytes" or the path of a tokenizer.json: it says how many
            bytes a token stands for.
        seq_len: Context in tokens, a multiple of the processes that share a sequence.
        batch_size: Windows in a batch, for each group of processes that share a sequence.
        seed: Seed of order and offsets.
        num_workers: Processes that prepare batches; 0 prepares them in the training process.

    Raises:
        ValueError: An option is out of range, or a file cannot be read or is too short.
    """

    objective: Objective = "causal"

    def __init__(
        self,
        *,
        train: str,
        val: str | None = None,
        test: str | None = None,
        dtype: str | None = None,
        tokenizer: str = "bytes",
        seq_len: int = 8192,
        batch_size: int = 1,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        check_least(seq_len=(seq_len, 1), batch_size=(batch_size, 1))
        check_least(seed=(seed, 0), num_workers=(num_workers, 0))
        self.seq_len, self.batch_size = seq_len, batch_size
        self.seed, self.num_workers = seed, num_workers
        self.tokenizer = load_tokenizer(tokenizer)
        paths = {"train": train, "val": val, "test": test}
        self._tokens = {
            split: open_tokens(path, dtype=dtype, seq_len=seq_len)
            for split, path in paths.items()
            if path is not None
        }
        self._train_loader: tuple[L.Trainer | None, SeededLoader] | None = None

    def train_dataloader(self) -> SeededLoader:
        """Returns the training batches; a trainer that asks again gets the same loader."""
        trainer = self.trainer
        if self._train_loader is None or trainer is None or self._train_loader[0] is not trainer:
            self._train_loader = (trainer, self._make_train_loader())
        return self._train_loader[1]

    def val_dataloader(self) -> FixedLoader | list[Any]:
        """Returns the validation batches; none if nothing is held out."""
        return self._eval_loader("val") if "val" in self._tokens else []

    def test_dataloader(self) -> FixedLoader:
        """Returns the test batches."""
        if "test" not in self._tokens:
            raise ValueError("the test needs held-out tokens, got test=None. Pass data.test.")
        return self._eval_loader("test")

    def _make_train_loader(self) -> SeededLoader:
        windows = self._windows("train", seed=self.seed)
        return SeededLoader(
            windows,
            num_samples=len(windows),
            unit="windows",
            order={
                "tokens": windows.num_tokens,
                "content": _fingerprint(self._tokens["train"]),
                "seq_len": self.seq_len,
            },
            seed=self.seed,
            repeat=getattr(self.trainer, "overfit_batches", 0),
            **self._loader_options(),
        )

    def _eval_loader(self, split: str) -> FixedLoader:
        windows = self._windows(split, seed=None)
        return FixedLoader(windows, fair_order(len(windows)), **self._loader_options())

    def _windows(self, split: str, *, seed: int | None) -> "TokenWindows":
        strategy = getattr(self.trainer, "strategy", None)
        mesh = getattr(strategy, "sequence_mesh", None)
        return TokenWindows(
            self._tokens[split],
            vocab_size=self.tokenizer.vocab_size,
            seq_len=self.seq_len,
            seed=seed,
            sequence_rank=0 if mesh is None else mesh.get_local_rank(),
            sequence_size=1 if mesh is None else mesh.size(),
            layout=getattr(strategy, "layout", "contiguous"),
        )

    def _loader_options(self) -> dict[str, Any]:
        rank, world_size = data_rank(self.trainer)
        return {
            "batch_size": self.batch_size,
            "rank": rank,
            "world_size": world_size,
            "num_workers": self.num_workers,
            "pin_memory": torch.cuda.is_available(),
        }


class TokenWindows(Dataset[dict[str, Any]]):
    """A process' part of windows of a token file, the same wherever and whenever it is read.

    With a seed, a request is that of a `SeededLoader`, and every epoch starts at another offset;
    without, it is that of a `FixedLoader`.

    Args:
        tokens: The ids, (num_tokens,), mapped from disk.
        vocab_size: Number of ids that there are.
        seq_len: Context in tokens, the distance between windows.
        seed: Seed of the training order; None for evaluation.
        sequence_rank: Place among the processes that share a sequence.
        sequence_size: Number of these processes.
        layout: Which tokens each takes.

    Raises:
        ValueError: `seq_len` does not split evenly; later, that an id is not in the vocabulary.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        vocab_size: int,
        seq_len: int,
        seed: int | None,
        sequence_rank: int = 0,
        sequence_size: int = 1,
        layout: Layout = "contiguous",
    ) -> None:
        step = sequence_size * (2 if layout == "zigzag" and sequence_size > 1 else 1)
        if seq_len % step:
            low = seq_len // step * step
            nearest = " or ".join(str(n) for n in (low, low + step) if n)
            raise ValueError(
                f"seq_len must be a multiple of {step} for sequence_parallel_size={sequence_size} "
                f"and layout={layout!r}, got seq_len={seq_len}. Set data.seq_len to {nearest}."
            )
        self.num_tokens = len(tokens)
        self._tokens, self._vocab_size = tokens, vocab_size
        self._seq_len, self._seed = seq_len, seed
        self._order = None if seed is None else EpochOrder(len(self), seed=seed)
        self._is_part = sequence_size > 1
        length = seq_len // sequence_size
        self._start, self._length = sequence_rank * length, length
        # Contiguous tokens are one slice, others are picked one by one.
        self._positions = (
            None
            if layout == "contiguous" or not self._is_part
            else positions_of(sequence_rank, sequence_size, length, layout).numpy()
        )

    def __len__(self) -> int:
        """Returns the number of windows, each with the label behind its last token."""
        return (self.num_tokens - 1) // self._seq_len

    def __getitem__(self, request: Any) -> dict[str, Any]:
        if self._order is None:
            places, offset = request, 0
        else:
            epoch, first, count = request
            places, offset = (
                self._order.samples(epoch, first=first, count=count),
                self._shift(epoch),
            )
        rows = [self._read(offset + max(0, place) * self._seq_len) for place in places]
        tokens, labels = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
        self._check_ids(tokens, labels)
        for row, place in enumerate(places):
            if place == FILLER:
                labels[row] = IGNORE_INDEX
        return {"tokens": tokens, "labels": labels, **({"is_part": True} if self._is_part else {})}

    def _shift(self, epoch: int) -> int:
        """Returns where the first window of an epoch starts; what no window holds varies so."""
        left_over = self.num_tokens - 1 - len(self) * self._seq_len
        return int(np.random.default_rng((self._seed, epoch, 1)).integers(left_over + 1))

    def _check_ids(self, *ids: torch.Tensor) -> None:
        """Refuses ids that the tokenizer does not have, which a GPU would only stumble over."""
        lowest = min(int(part.min()) for part in ids)
        highest = max(int(part.max()) for part in ids)
        if lowest < 0 or highest >= self._vocab_size:
            path = getattr(self._tokens, "filename", "memory")
            raise ValueError(
                f"token ids must be in [0, vocab_size) with the tokenizer's vocab_size="
                f"{self._vocab_size}, got ids from {lowest} to {highest} in '{path}'. Set "
                "data.tokenizer to what the file was written with."
            )

    def _read(self, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Reads tokens and labels of this part of the window at `start`."""
        if self._positions is not None:
            picked = (
                self._tokens[start + self._positions],
                self._tokens[start + self._positions + 1],
            )
            return picked[0].astype(np.int64), picked[1].astype(np.int64)
        start += self._start
        part = self._tokens[start : start + self._length + 1].astype(np.int64)
        return part[:-1], part[1:]


def open_tokens(path: str | Path, *, dtype: str | None, seq_len: int) -> np.ndarray:
    """Maps a token file into memory.

    Args:
        path: A one-dimensional .npy file of integers, or a raw file.
        dtype: Type of the numbers in a raw file; None for .npy.
        seq_len: Tokens of a window, of which there must be at least one, and a label behind it.

    Raises:
        ValueError: There is no such file, it holds something else, or it is too short.
    """
    path, is_npy = Path(path), Path(path).suffix == ".npy"
    if is_npy != (dtype is None):
        raise ValueError(
            f"dtype is for raw files, and .npy files bring theirs, got {str(path)!r} with "
            f"dtype={dtype!r}. {'Leave it out' if is_npy else 'Pass it, such as uint16'}."
        )
    try:
        if is_npy:
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            tokens = np.memmap(path, dtype=np.dtype(dtype), mode="r")
    # An empty file is an EOFError.
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise ValueError(
            f"the token file must be readable, got {str(path)!r}: {error}. "
            "recipes.token_file_writer makes one."
        ) from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"a token file holds one row of integers, got {tokens.dtype} of shape {tokens.shape} "
            f"in {str(path)!r}. recipes.token_file_writer makes one."
        )
    if len(tokens) <= seq_len:
        raise ValueError(
            f"a token file must hold more than seq_len={seq_len:,} tokens, got {len(tokens):,} in "
            f"{str(path)!r}. Shorten seq_len, or write more text."
        )
    return tokens


def _fingerprint(tokens: np.ndarray) -> str:
    """Returns what tells a file from another one of its length, without reading all of it."""
    places = np.linspace(0, len(tokens) - 1, 512).astype(np.int64)
    return hashlib.sha256(tokens[places].astype(np.int64).tobytes()).hexdigest()[:12]


def main(args: list[str] | None = None) -> None:
    """Runs the command line."""
    run(TextLM, TokenFileDataModule, args=args)


if __name__ == "__main__":
    main()
