"""Tiny recordings and a tiny audio model, shared by the tests of the audio recipes."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

import longnet_zoo as lz

RATE = 4000
# A pitch for each class.
PITCHES = {"high": 1500.0, "low": 200.0, "middle": 600.0}
CLASSES = tuple(sorted(PITCHES))


def tiny_audio() -> dict[str, Any]:
    """Returns options that make the audio model tiny, at 4 kHz and 25 frames a second."""
    return {
        "sample_rate": RATE,
        "window_size": 128,
        "hop_size": 80,
        "num_mels": 16,
        "conv_strides": [1, 2],
        "embed_dim": 16,
        "num_layers": 1,
        "num_heads": 2,
        "segment_lengths": [8, 16],
        "dilation_rates": [1, 2],
    }


def tiny_model(**options: Any) -> Any:
    """Makes that model."""
    return lz.create_model("longnet_audio_tiny", **(tiny_audio() | options))


def tone(pitch: float, seconds: float, *, seed: int = 0, rate: int = RATE) -> np.ndarray:
    """Returns a pitch with some noise, (samples,) float32."""
    draw = np.random.default_rng(seed)
    times = np.arange(round(seconds * rate)) / rate
    wave = 0.5 * np.sin(2 * np.pi * pitch * times) + 0.02 * draw.standard_normal(len(times))
    return wave.astype(np.float32)


def write_tones(folder: Path, *, per_class: int = 8, seconds: float = 0.2) -> Path:
    """Writes tones of three pitches, a folder for each."""
    for name, pitch in PITCHES.items():
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            wave = tone(pitch, seconds + 0.01 * number, seed=number)
            soundfile.write(folder / name / f"{number:02d}.wav", wave, RATE)
    return folder


def encoded(wave: np.ndarray, *, rate: int = RATE, file_format: str = "FLAC") -> bytes:
    """Returns the bytes of a file."""
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=file_format)
    return file.getvalue()


def write_damaged(folder: Path) -> dict[str, str]:
    """Writes files that cannot be read, and returns what the error says of each."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = encoded(tone(300.0, 1.0))
    (folder / "truncated.flac").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_text("this is no sound")
    soundfile.write(folder / "silent.wav", np.zeros(0, dtype=np.float32), RATE)
    wave = tone(300.0, 0.5)
    wave[1000] = np.nan
    soundfile.write(folder / "nan.wav", wave, RATE, subtype="FLOAT")
    return {
        "truncated.flac": "truncated",
        "empty.wav": "is empty",
        "text.wav": "cannot be read as audio",
        "silent.wav": "has none",
        "nan.wav": "0.250 seconds",
    }


def same_batches(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Returns whether two batches hold the same."""
    return (
        a["names"] == b["names"]
        and torch.equal(a["waveform"], b["waveform"])
        and torch.equal(a["labels"], b["labels"])
    )
