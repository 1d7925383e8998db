"""Packs documents into windows of one length and makes training batches from them.

The documents of a split stand one behind the other in one array of token ids, each closed by the
end-of-document id. A window is a slice of that stream: no padding, no token lost. The stream of an
epoch is a ring: it starts at a random offset, so windows differ from epoch to epoch, and every
function here is pure in (seed, epoch, window), so any batch can be made again at any time.

Shapes: b rows, n tokens of context (`seq_len`), m = n + 1 for next-token labels, else n.
"""

import dataclasses
from collections.abc import Sequence
from typing import Generic, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from longnet_zoo.tokenizers import Tokenizer

__all__ = [
    "IGNORE_INDEX",
    "DocumentEncoder",
    "EpochPlan",
    "Objective",
    "PackedDocuments",
    "Packer",
    "collate",
    "plan_epoch",
    "read_window",
    "window_size",
]

Objective = Literal["causal", "masked"]

IGNORE_INDEX = -100

# Texts are handed to the tokenizer in groups of about so many bytes: it is fast on groups, and
# only one group is held as text.
_GROUP_BYTES = 2**20

# Independent random streams of one seed.
_OFFSET, _DOCUMENTS, _WINDOWS, _MASK = range(4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedDocuments:
    """The token stream of a split.

    Attributes:
        tokens: Ids of all documents, each closed by the end-of-document id, (num_tokens,).
        starts: Where each document starts, and the total length behind, (num_documents + 1,).
        num_bytes: Bytes of text in the stream.
    """

    tokens: np.ndarray
    starts: np.ndarray
    num_bytes: int

    @property
    def num_tokens(self) -> int:
        """Tokens in the stream, end-of-document ids included."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """Documents in the stream."""
        return len(self.starts) - 1

    def part(self, start: int, stop: int, tokenizer: Tokenizer) -> "PackedDocuments":
        """Returns the tokens from `start` to `stop` as a stream; documents may be cut.

        Args:
            start: First token.
            stop: Token behind the last one.
            tokenizer: Tells how many bytes the tokens stand for.
        """
        tokens = self.tokens[start:stop]
        inner = self.starts[(self.starts > start) & (self.starts < stop)]
        edges = [start, *inner, stop] if stop > start else [start]
        counts = np.bincount(tokens, minlength=tokenizer.vocab_size)
        return PackedDocuments(
            tokens=tokens,
            starts=np.array(edges, np.int64) - start,
            num_bytes=int(counts @ tokenizer.token_bytes.numpy()),
        )


Document = TypeVar("Document")


class DocumentEncoder(Generic[Document]):
    """Turns documents into ids, in groups, each document closed by the end-of-document id.

    Args:
        tokenizer: Makes the ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._waiting: list[tuple[Document, bytes]] = []
        self._waiting_bytes = 0

    def add(self, document: Document, text: bytes) -> list[tuple[Document, np.ndarray]]:
        """Takes a document; returns those of its group, with their ids, if it fills the group."""
        self._waiting.append((document, text))
        self._waiting_bytes += len(text)
        return self.finish() if self._waiting_bytes >= _GROUP_BYTES else []

    def finish(self) -> list[tuple[Document, np.ndarray]]:
        """Returns the documents that wait for their group to fill up, with their ids."""
        waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        encoded = self._tokenizer.encode_batch([text for _, text in waiting])
        eod_id, dtype = self._tokenizer.eod_id, self._tokenizer.dtype
        return [
            (document, np.append(ids, eod_id).astype(dtype))
            for (document, _), ids in zip(waiting, encoded, strict=True)
        ]


class Packer:
    """Collects documents into a token stream.

    Args:
        tokenizer: Makes the ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encoder = DocumentEncoder[None](tokenizer)
        self._pieces = [np.zeros(0, tokenizer.dtype)]
        self._num_tokens = 0
        self._num_bytes = 0

    @property
    def num_tokens(self) -> int:
        """Tokens so far, without the documents that wait for their group to fill up."""
        return self._num_tokens

    def add(self, text: bytes) -> None:
        """Appends a document."""
        self._num_bytes += len(text)
        self._take(self._encoder.add(None, text))

    def finish(self) -> PackedDocuments:
        """Returns the stream of all documents added."""
        self._take(self._encoder.finish())
        return PackedDocuments(
            tokens=np.concatenate(self._pieces),
            starts=np.cumsum([len(piece) for piece in self._pieces], dtype=np.int64),
            num_bytes=self._num_bytes,
        )

    def _take(self, documents: list[tuple[None, np.ndarray]]) -> None:
        self._pieces += [ids for _, ids in documents]
        self._num_tokens += sum(len(ids) for _, ids in documents)


def window_size(seq_len: int, objective: Objective) -> int:
    """Returns the tokens a window needs: the last next-token label lies one beyond the context."""
    return seq_len + 1 if objective == "causal" else seq_len


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """The order of one epoch.

    Attributes:
        windows: Windows in the order in which they are visited, (num_windows,).
        offset: Place in the stream where window 0 starts.
        documents: Order of the documents in the stream, (num_documents,); None is path order.
        ends: Where each of `documents` ends in the stream, (num_documents,); None likewise.
    """

    windows: np.ndarray
    offset: int
    documents: np.ndarray | None = None
    ends: np.ndarray | None = None


def plan_epoch(
    packed: PackedDocuments, *, seq_len: int, seed: int, epoch: int, shuffle_documents: bool
) -> EpochPlan:
    """Draws the order of documents and windows of an epoch.

    Args:
        packed: Token stream.
        seq_len: Distance between windows in tokens.
        seed: Seed of the run.
        epoch: Epoch, counted from 0.
        shuffle_documents: Whether documents change their order, too.

    Returns:
        The plan, the same whenever it is asked for.
    """

    def draw(stream: int) -> np.random.Generator:
        return np.random.default_rng([seed, stream, epoch])

    plan = EpochPlan(
        windows=draw(_WINDOWS).permutation(packed.num_tokens // seq_len),
        offset=int(draw(_OFFSET).integers(seq_len)),
    )
    if not shuffle_documents:
        return plan
    documents = draw(_DOCUMENTS).permutation(packed.num_documents)
    ends = np.cumsum(np.diff(packed.starts)[documents])
    return dataclasses.replace(plan, documents=documents, ends=ends)


def read_window(packed: PackedDocuments, plan: EpochPlan, start: int, size: int) -> np.ndarray:
    """Copies tokens out of the stream, which is closed to a ring.

    Args:
        packed: Token stream.
        plan: Order of the documents in it.
        start: First token, counted from the start of the stream.
        size: Number of tokens, at most those of the whole stream.

    Returns:
        The ids, (size,).
    """
    start %= packed.num_tokens
    head = min(size, packed.num_tokens - start)
    parts = _slices(packed, plan, start, start + head) + _slices(packed, plan, 0, size - head)
    return np.concatenate(parts)


def _slices(packed: PackedDocuments, plan: EpochPlan, start: int, stop: int) -> list[np.ndarray]:
    if plan.documents is None or plan.ends is None:
        return [packed.tokens[start:stop]]
    parts = []
    at = int(np.searchsorted(plan.ends, start, side="right"))
    while start < stop:
        # The document's place in the array minus its place in the shuffled stream.
        shift = packed.starts[plan.documents[at] + 1] - plan.ends[at]
        end = min(stop, int(plan.ends[at]))
        parts.append(packed.tokens[start + shift : end + shift])
        start, at = end, at + 1
    return parts


def collate(
    windows: np.ndarray,
    *,
    tokenizer: Tokenizer,
    objective: Objective,
    confine_to_document: bool = False,
    mask_probability: float = 0.15,
    mask_seeds: Sequence[Sequence[int]] | None = None,
) -> dict[str, Tensor]:
    """Makes a batch of windows.

    Args:
        windows: Token ids, (b, m).
        tokenizer: Gives the special ids.
        objective: "causal" labels each token with the next one; "masked" hides some tokens and
            labels these with themselves.
        confine_to_document: Whether to pack all rows into one, with the boundaries of documents
            and rows, and to leave out labels that lie in the next document.
        mask_probability: Share of tokens hidden for "masked".
        mask_seeds: Seeds of the masks, one sequence of integers a row; for "masked" only.

    Returns:
        `tokens` and `labels`, int64, (b, n), labels -100 where there is no loss. If confined,
        (1, b * n) and `cu_seqlens`, int32, (num_sequences + 1,).
    """
    ids = windows.astype(np.int64)
    if objective == "causal":
        tokens, labels = ids[:, :-1], ids[:, 1:].copy()
        if confine_to_document:
            labels[tokens == tokenizer.eod_id] = IGNORE_INDEX
    else:
        assert mask_seeds is not None
        rows = [
            _mask(row, np.random.default_rng([_MASK, *seeds]), tokenizer, mask_probability)
            for row, seeds in zip(ids, mask_seeds, strict=True)
        ]
        tokens, labels = (np.stack(part) for part in zip(*rows, strict=True))
    batch = {"tokens": tokens, "labels": labels}
    if confine_to_document:
        batch = {name: value.reshape(1, -1) for name, value in batch.items()}
        # The unmasked ids tell the boundaries; a mask never hides them, nor invents one.
        batch["cu_seqlens"] = _boundaries(batch["tokens"][0], tokens.shape[1], tokenizer.eod_id)
    return {name: torch.from_numpy(np.ascontiguousarray(part)) for name, part in batch.items()}


def _mask(
    row: np.ndarray, rng: np.random.Generator, tokenizer: Tokenizer, probability: float
) -> tuple[np.ndarray, np.ndarray]:
    """Hides tokens as BERT does: of those chosen 80 % masked, 10 % random, 10 % as they were."""
    assert tokenizer.mask_id is not None
    places = np.flatnonzero(row != tokenizer.eod_id)
    chosen = places[rng.random(len(places)) < probability]
    if not len(chosen) and len(places):
        # A row without labels would have no mean loss.
        chosen = rng.choice(places, 1)
    tokens, labels = row.copy(), np.full_like(row, IGNORE_INDEX)
    labels[chosen] = row[chosen]
    fate = rng.random(len(chosen))
    tokens[chosen[fate < 0.8]] = tokenizer.mask_id
    random = chosen[fate >= 0.9]
    tokens[random] = rng.choice(tokenizer.regular_ids, len(random))
    return tokens, labels


def _boundaries(flat: np.ndarray, row_size: int, eod_id: int) -> np.ndarray:
    """Returns where sequences start in a row of packed rows, with the total length behind."""
    rows = np.arange(0, len(flat) + 1, row_size)
    documents = np.flatnonzero(flat == eod_id) + 1
    return np.union1d(rows, documents).astype(np.int32)
