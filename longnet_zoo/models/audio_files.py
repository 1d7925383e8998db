"""Recordings as samples for a model: any format of libsndfile, rate, length and channels.

Files are read in blocks, mixed to mono (the mean of the channels) and resampled by
`torchaudio.functional.resample`: windowed sinc interpolation, whose every output sees a fixed span
of inputs around it, so that blocks resampled with the samples around them are, joined, the whole
resampled. Needs soundfile, and torchaudio for files of another rate.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, TypeAlias

import torch
from torch import Tensor

__all__ = ["AudioInfo", "AudioSource", "audio_blocks", "audio_info", "read_audio"]

AudioSource: TypeAlias = "str | os.PathLike[str] | bytes | BinaryIO"

_BLOCK_SECONDS = 30.0
# torchaudio makes the interpolation filters of all phases at once, each as long as a period, most
# of it zeros: 2**26 entries are 256 MiB. Beyond that they are made here, without the zeros.
_MOST_FILTER_ENTRIES = 2**26
# More than any integer of 32 bits: damage, whose square float32 could not hold.
_LARGEST = 2.0**31
_LOWPASS_WIDTH, _ROLLOFF = 6, 0.99  # torchaudio's defaults
# Headers that count what follows; writers often get those of the whole file wrong by some bytes.
_SIZE_IN_LOG = re.compile(r"^ *(.+?) *: *(\d+) \(should be (\d+)\)", re.MULTILINE)
_WHOLE_FILE = ("RIFF", "FORM")
_UNKNOWN_SIZES = (0x7FFFFFFF, 0xFFFFFFFF)  # written by programmes that pipe
_UNKNOWN_FRAMES = 2**62  # libsndfile's number for a FLAC file without one is beyond


@dataclass(frozen=True, kw_only=True)
class AudioInfo:
    """What the header of a recording says.

    Attributes:
        sample_rate: Samples per second.
        num_channels: Channels.
        num_samples: Samples of each channel.
        file_format: Name of the format and of the encoding in it, such as "WAV PCM_16".
    """

    sample_rate: int
    num_channels: int
    num_samples: int
    file_format: str

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.num_samples / self.sample_rate


def audio_info(source: AudioSource) -> AudioInfo:
    """Reads the header of a recording.

    Args:
        source: A path, the bytes of a file or a file object.

    Returns:
        Rate, channels and length.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is empty, no audio, or shorter than its header says.
        RuntimeError: If soundfile is missing.
    """
    with _open(source) as (file, _):
        return _info(file)


def read_audio(
    source: AudioSource,
    *,
    sample_rate: int,
    start: float = 0.0,
    duration: float | None = None,
    on_warning: Callable[[str], None] | None = None,
) -> Tensor:
    """Reads a recording, or a part of it, as mono samples at a rate.

    A part equals that part of the whole, resampled: it is read with the samples around it.

    Args:
        source: A path, the bytes of a file or a file object.
        sample_rate: Samples per second that are wanted, those of the model.
        start: Seconds to skip.
        duration: Seconds to read; None, or beyond the end: to the end.
        on_warning: Is told, by file, of what was mended: another rate, several channels.

    Returns:
        Samples, float32 (samples,); integers in the file are scaled to [-1, 1].

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is empty, no audio, truncated or holds what is no number, or the
            part lies outside of it.
        RuntimeError: If soundfile or torchaudio is missing.

    Example:
        >>> samples = read_audio("talk.flac", sample_rate=model.config.sample_rate)
        >>> logits = model(samples[None])
    """
    _check_rate(sample_rate)
    if not 0.0 <= start < math.inf or not (duration is None or 0.0 < duration < math.inf):
        raise ValueError(
            "start must be at least 0 seconds and duration above 0 or None, got "
            f"start={start} and duration={duration}."
        )
    with _open(source) as (file, name):
        info = _info(file)
        first = round(start * sample_rate)
        total = -(-info.num_samples * sample_rate // info.sample_rate)
        if first >= total:
            raise ValueError(
                f"start must lie within {name}, got start={start} for {info.seconds:.3f} seconds."
            )
        if on_warning is not None:
            if info.sample_rate != sample_rate:
                on_warning(f"{name}: {info.sample_rate} Hz, resampled to {sample_rate} Hz")
            if info.num_channels > 1:
                on_warning(f"{name}: {info.num_channels} channels, mixed to one")
        end = total
        if duration is not None:
            end = min(total, first + max(1, round(duration * sample_rate)))
        blocks = list(_resampled(file, name, sample_rate, (first, end), _BLOCK_SECONDS))
    return torch.cat(blocks)[: end - first]


def audio_blocks(
    source: AudioSource, *, sample_rate: int, seconds: float = _BLOCK_SECONDS
) -> Iterator[Tensor]:
    """Reads a recording block by block; the blocks joined are what `read_audio` returns.

    Args:
        source: A path, the bytes of a file or a file object.
        sample_rate: Samples per second that are wanted.
        seconds: About how much a block holds.

    Yields:
        Samples, float32 (samples,).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: As for `read_audio`.
        RuntimeError: If soundfile or torchaudio is missing.
    """
    _check_rate(sample_rate)
    if not 0.0 < seconds < math.inf:
        raise ValueError(f"seconds must be a positive number, got {seconds}.")
    with _open(source) as (file, name):
        yield from _resampled(file, name, sample_rate, (0, None), seconds)


@contextmanager
def _open(source: AudioSource) -> Iterator[tuple[Any, str]]:
    """Opens a recording that is whole as far as its header tells; gives it and its name."""
    try:
        import soundfile
    except ImportError as error:
        raise RuntimeError(
            "reading recordings needs soundfile. Install it: pip install soundfile"
        ) from error
    name = _name(source)
    if isinstance(source, (str, os.PathLike)):
        stream: Any = open(source, "rb")  # noqa: SIM115 - closed below, if it is ours
    elif isinstance(source, (bytes, bytearray, memoryview)):
        stream = io.BytesIO(source)
    elif hasattr(source, "read"):
        stream = source if _can_seek(source) else io.BytesIO(source.read())
    else:
        raise TypeError(f"source must be a path, bytes or a file object, got {name}.")
    try:
        start = stream.tell()
        size = stream.seek(0, io.SEEK_END) - start
        if size == 0:
            raise ValueError(f"a recording must have a header and samples, {name} is empty.")
        is_cut, stated = _is_cut_ogg(stream, start, size), _frames_of_sphere(stream, start)
        stream.seek(start)
        with soundfile.SoundFile(stream) as file:
            if is_cut or file.frames < stated or _is_cut_by_its_log(file.extra_info):
                raise ValueError(
                    f"{name} is truncated: its {size} bytes end before the audio does. Copy or "
                    "download it again."
                )
            if file.frames >= _UNKNOWN_FRAMES:
                raise ValueError(
                    f"a recording must say how long it is, the header of {name} does not, as those "
                    "that are written into a pipe. Write it again: ffmpeg -i old.flac new.flac"
                )
            if file.frames == 0:
                raise ValueError(f"a recording must have samples, {name} has none.")
            yield file, name
    except soundfile.LibsndfileError as error:
        raise ValueError(
            f"{name} cannot be read as audio: it is truncated, damaged or of another format "
            f"(libsndfile: {error.error_string.strip() or 'no reason given'})."
        ) from error
    finally:
        if stream is not source:
            stream.close()


def _name(source: Any) -> str:
    if isinstance(source, (str, os.PathLike)):
        return repr(os.fspath(source))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"a recording of {len(source)} bytes"
    name = getattr(source, "name", None)
    return repr(name) if isinstance(name, str) else f"a {type(source).__name__}"


def _can_seek(source: Any) -> bool:
    return hasattr(source, "seekable") and source.seekable()


def _is_cut_by_its_log(log: str) -> bool:
    """Whether a header counts more than the file holds, which libsndfile notes and goes on."""
    return any(
        int(stated) > int(found) and int(stated) not in _UNKNOWN_SIZES
        for name, stated, found in _SIZE_IN_LOG.findall(log)
        if name not in _WHOLE_FILE
    )


def _is_cut_ogg(stream: Any, start: int, size: int) -> bool:
    """Whether the last page of an Ogg file is incomplete, or not marked as the last (RFC 3533)."""
    stream.seek(start)
    if stream.read(4) != b"OggS":
        return False
    stream.seek(start + max(0, size - 2 * 65307))  # the longest page has 65,307 bytes
    tail = stream.read()
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < 27 or len(page) < 27 + page[26]:
        return True
    return not page[5] & 4 or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]])


def _frames_of_sphere(stream: Any, start: int) -> int:
    """Samples that the header of a NIST SPHERE file states, unread by libsndfile; 0 for others."""
    stream.seek(start)
    header = stream.read(1024)
    stated = re.search(rb"^sample_count -i (\d+)", header, re.MULTILINE)
    return int(stated[1]) if stated and header.startswith(b"NIST_1A") else 0


def _info(file: Any) -> AudioInfo:
    return AudioInfo(
        sample_rate=file.samplerate,
        num_channels=file.channels,
        num_samples=file.frames,
        file_format=f"{file.format} {file.subtype}",
    )


def _check_rate(sample_rate: int) -> None:
    if type(sample_rate) is not int or sample_rate < 1:
        raise ValueError(f"sample_rate must be an integer of at least 1, got {sample_rate!r}.")


def _resampled(
    file: Any, name: str, sample_rate: int, span: tuple[int, int | None], seconds: float
) -> Iterator[Tensor]:
    """Reads samples [first, end) of those at the new rate, and some more behind a given end.

    With the rates in lowest terms, old inputs and new outputs make a period; outputs of a period
    see its inputs and at most `context` on either side, a whole number of periods.
    """
    first, end = span
    divisor = math.gcd(file.samplerate, sample_rate)
    old, new = file.samplerate // divisor, sample_rate // divisor
    block_size = max(1, round(seconds * file.samplerate))
    if old == new:
        yield from _mono_blocks(file, name, (first, end or file.frames), block_size)
        return
    width = math.ceil(_LOWPASS_WIDTH * old / (min(old, new) * _ROLLOFF))
    if new * (2 * width + 2) > _MOST_FILTER_ENTRIES:
        raise ValueError(
            f"rates must share a divisor or be alike to be resampled, got {file.samplerate} Hz in "
            f"{name} and sample_rate={sample_rate}, which share {divisor}. Convert the file first."
        )
    has_few = new * (old + 2 * width) <= _MOST_FILTER_ENTRIES
    resample = _make_resample(old, new) if has_few else _make_sparse_resample(old, new, width)
    context = -(-width // old) * old
    begin = first // new * old - context
    stop = file.frames if end is None else min(file.frames, -(-end // new) * old + context)
    held = torch.zeros(max(0, -begin))  # silence before the file
    skipped = first % new
    for block in _mono_blocks(file, name, (max(0, begin), stop), block_size):
        held = torch.cat([held, block])
        usable = (len(held) - 2 * context) // old * old
        if usable > 0:
            out = resample(held[: usable + 2 * context])
            out = out[context // old * new : (context + usable) // old * new]
            yield out[skipped:]
            held, skipped = held[usable:], max(0, skipped - len(out))
    out = resample(held)[context // old * new :]
    if len(out) > skipped:
        yield out[skipped:]


def _make_resample(old: int, new: int) -> Callable[[Tensor], Tensor]:
    try:
        from torchaudio.functional import resample
    except ImportError as error:
        raise RuntimeError(
            "resampling recordings needs torchaudio. Install it: pip install torchaudio"
        ) from error
    return partial(
        resample,
        orig_freq=old,
        new_freq=new,
        lowpass_filter_width=_LOWPASS_WIDTH,
        rolloff=_ROLLOFF,
    )


def _make_sparse_resample(old: int, new: int, width: int) -> Callable[[Tensor], Tensor]:
    """Makes torchaudio's filters from their formula, of the inputs alone that an output sees."""
    outputs = torch.arange(new)
    first = outputs * old // new  # an output lies at its phase of a period, behind this input
    places = first[:, None] + torch.arange(-width, width + 2)
    rate = min(old, new) * _ROLLOFF
    distances = rate * (places.double() / old - outputs.double()[:, None] / new)
    distances = distances.clamp(-_LOWPASS_WIDTH, _LOWPASS_WIDTH)
    window = (distances * (math.pi / (2 * _LOWPASS_WIDTH))).cos().square()
    filters = (torch.sinc(distances) * window * (rate / old)).float()
    places = places + width

    def run(samples: Tensor) -> Tensor:
        total = -(-len(samples) * new // old)
        num_periods = -(-total // new)
        behind = num_periods * old + width + 2 - len(samples)
        padded = torch.nn.functional.pad(samples, (width, behind))
        parts = [
            (padded[period * old :][places] * filters).sum(dim=1) for period in range(num_periods)
        ]
        return torch.cat(parts)[:total]

    return run


def _mono_blocks(file: Any, name: str, span: tuple[int, int], block_size: int) -> Iterator[Tensor]:
    """Reads samples [first, end) of the file, (samples,) each, and checks them."""
    first, end = span
    if file.seekable():
        file.seek(first)
    else:  # such as GSM 6.10 in WAV
        file.read(first, dtype="float32")
    for begin in range(first, end, block_size):
        wanted = min(block_size, end - begin)
        samples = torch.from_numpy(file.read(wanted, dtype="float32", always_2d=True)).mean(dim=1)
        if len(samples) < wanted:
            raise ValueError(
                f"{name} is truncated: it ends after {begin + len(samples)} of its {file.frames} "
                "samples. Copy or download it again."
            )
        is_wrong = ~(samples.abs() <= _LARGEST)
        if is_wrong.any():
            place = begin + int(is_wrong.nonzero()[0])
            raise ValueError(
                f"samples must be finite numbers up to 2^31, {name} has others, the first at "
                f"{place / file.samplerate:.3f} seconds. Repair or drop it."
            )
        yield samples
