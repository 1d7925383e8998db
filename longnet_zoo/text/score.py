"""How well a causal model predicts a file, whatever its size: bits per byte in constant memory.

The file is read in pieces and the model in chunks, each going on where the last one ended, so the
score is that of one pass over the whole file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from longnet_zoo.models.text_decoder import LongNetLM
from longnet_zoo.ops.pattern import DilatedPattern
from longnet_zoo.tokenizers import Tokenizer

from .checks import check_vocabulary
from .pieces import read_pieces

__all__ = ["FileScore", "score_file"]

_PIECE_BYTES = 2**20
_USUAL_CHUNK = 8192
_LARGEST_CHUNK = 32768


@dataclass(frozen=True, kw_only=True)
class FileScore:
    """What a model makes of a file, or of its beginning.

    Attributes:
        num_bytes: Bytes of text that these tokens stand for.
        num_tokens: Tokens predicted.
        nats: Sum of their losses.
    """

    num_bytes: int = 0
    num_tokens: int = 0
    nats: float = 0.0

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model needs for a byte: 8 are no knowledge at all."""
        return self.nats / math.log(2) / self.num_bytes

    @property
    def perplexity(self) -> float:
        """The exponential of the mean loss of a token; infinite where no float holds it."""
        mean = self.nats / self.num_tokens
        return math.exp(mean) if mean < 700 else math.inf


@torch.no_grad()
def score_file(
    model: LongNetLM,
    path: str | Path,
    tokenizer: Tokenizer,
    *,
    chunk_size: int | None = None,
    on_progress: Callable[[FileScore], object] | None = None,
) -> FileScore:
    """Predicts every token of a file from all before it that the model's pattern reaches.

    The first token follows the end of another document.

    Args:
        model: A causal model, in evaluation mode, on any device.
        path: The file; text, or any bytes for a tokenizer of bytes.
        tokenizer: The tokenizer of the model's text. One with parts of words reads the file in
            pieces of whole lines, of one MiB.
        chunk_size: Tokens that the model reads at once; None: its longest segment, within reason.
        on_progress: Called with the score so far after each chunk.

    Returns:
        The score.

    Raises:
        ValueError: If the file is no file or holds no text, the tokenizer has ids that the model
            lacks, the model is in training mode, or `chunk_size` out of range.
        TypeError: If the model is not a causal model of text, or `chunk_size` no integer.
        OSError: If the file cannot be read.

    Example:
        >>> model = lz.create_model("longnet_lm_tiny", pretrained=True).eval()
        >>> score = score_file(model, "book.txt", load_tokenizer("bytes"))
        >>> score.bits_per_byte
    """
    check_vocabulary(model, tokenizer)
    size = _chunk_size(model.config.pattern) if chunk_size is None else chunk_size
    if type(size) is not int:
        raise TypeError(f"chunk_size must be an integer, got {size!r}.")
    if not 1 <= size < 2**31:
        raise ValueError(f"chunk_size must be 1 or more and below 2**31, got {size}.")
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"what is scored must be a file, got {path}. Write pipes to one first.")
    device = next(model.parameters()).device
    cache = model.make_cache()
    score = FileScore()
    last = torch.tensor([tokenizer.eod_id])
    for tokens in _chunks(Path(path), tokenizer, size):
        inputs, last = torch.cat([last, tokens[:-1]]), tokens[-1:]
        loss = model.loss(
            inputs[None].to(device), tokens[None].to(device), cache=cache, reduction="sum"
        )
        score = FileScore(
            num_bytes=score.num_bytes + int(tokenizer.token_bytes[tokens].sum()),
            num_tokens=score.num_tokens + len(tokens),
            nats=score.nats + float(loss),
        )
        if on_progress is not None:
            on_progress(score)
    if not score.num_bytes:
        raise ValueError(
            f"a file to score must hold text, got {path} with {Path(path).stat().st_size} bytes, "
            f"of which the tokenizer makes {score.num_tokens} tokens and no text."
        )
    return score


def _chunk_size(pattern: DilatedPattern) -> int:
    # At a border that all segments share nothing from before is seen, and attention is quickest.
    longest = pattern.segment_lengths[-1]
    is_usual = pattern.is_nested and _USUAL_CHUNK // 8 <= longest <= _LARGEST_CHUNK
    return longest if is_usual else _USUAL_CHUNK


def _chunks(path: Path, tokenizer: Tokenizer, size: int) -> Iterator[Tensor]:
    """Yields the tokens of a file, `size` at a time."""
    waiting = torch.empty(0, dtype=torch.int64)
    for _, piece in read_pieces(path, max_bytes=_PIECE_BYTES):
        new = torch.from_numpy(tokenizer.encode_batch([piece])[0].astype("int64"))
        *full, waiting = torch.cat([waiting, new]).split(size)
        yield from full
        if len(waiting) == size:
            yield waiting
            waiting = waiting[:0]
    if len(waiting):
        yield waiting
