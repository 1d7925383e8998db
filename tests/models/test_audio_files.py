import io
import re
import sys

import numpy as np
import pytest
import soundfile
import torch
from torchaudio.functional import resample

from longnet_zoo.models import audio_files
from longnet_zoo.models.audio_files import AudioInfo, audio_blocks, audio_info, read_audio

# Every format of libsndfile that people have, and whether it keeps samples as they are.
FORMATS = [
    ("wav", "PCM_16", True),
    ("wav", "FLOAT", True),
    ("flac", "PCM_16", True),
    ("aiff", "PCM_16", True),
    ("w64", "PCM_16", True),
    ("ogg", "VORBIS", False),
    ("ogg", "OPUS", False),
    ("mp3", "MPEG_LAYER_III", False),
    ("nist", "PCM_16", True),
]


def make_samples(num=9000, channels=2):
    """Samples that 16 bits hold exactly, (num, channels)."""
    levels = np.random.default_rng(0).integers(-9000, 9000, (num, channels))
    return (levels / 2**15).astype(np.float32)


def write(path, samples, rate=16000, **options):
    soundfile.write(path, samples, rate, **options)
    return path


def as_bytes(samples, rate=16000, file_format="WAV", subtype="PCM_16"):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=file_format, subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize(("suffix", "subtype", "is_exact"), FORMATS)
def test_formats_are_read_as_mono_in_minus_one_to_one(suffix, subtype, is_exact, tmp_path):
    samples = make_samples()
    path = write(tmp_path / f"a.{suffix}", samples, subtype=subtype)
    info = audio_info(path)
    assert (info.sample_rate, info.num_channels) == (16000, 2)
    assert info.file_format == f"{suffix.upper()} {subtype}"
    found = read_audio(path, sample_rate=16000)
    assert found.dtype == torch.float32
    assert found.shape == (info.num_samples,) == (9000,)
    if is_exact:
        torch.testing.assert_close(found, torch.from_numpy(samples).mean(1), atol=1e-7, rtol=0)


def test_info_says_what_the_header_says():
    info = audio_info(as_bytes(make_samples(4410), 44100))
    assert info == AudioInfo(
        sample_rate=44100, num_channels=2, num_samples=4410, file_format="WAV PCM_16"
    )
    assert info.seconds == 0.1


def test_paths_bytes_and_file_objects_give_the_same(tmp_path):
    path = write(tmp_path / "a.wav", make_samples())
    content = path.read_bytes()
    expected = read_audio(path, sample_rate=8000)

    class Pipe(io.RawIOBase):
        def read(self, size=-1):
            return content

        def seekable(self):
            return False

    with open(path, "rb") as file:
        for source in (str(path), content, memoryview(content), io.BytesIO(content), file, Pipe()):
            assert torch.equal(read_audio(source, sample_rate=8000), expected)
        assert not file.closed


@pytest.mark.parametrize(
    ("rate", "sample_rate"), [(44100, 16000), (16000, 44100), (8000, 16000), (48000, 16000)]
)
def test_blocks_joined_are_the_whole_resampled(rate, sample_rate, monkeypatch):
    samples = make_samples(8765)
    whole = resample(torch.from_numpy(samples).mean(1), rate, sample_rate)
    content = as_bytes(samples, rate)
    for seconds in (0.0013, 0.011, 0.1, 30.0):
        blocks = list(audio_blocks(content, sample_rate=sample_rate, seconds=seconds))
        assert (len(blocks) > 2) == (seconds < 1)
        assert min(map(len, blocks)) > 0
        torch.testing.assert_close(torch.cat(blocks), whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(read_audio(content, sample_rate=sample_rate), whole)
    monkeypatch.setattr(audio_files, "_BLOCK_SECONDS", 0.05)
    for start, duration in ((0.0, 0.01), (0.0731, 0.05), (0.05, None), (0.1, 9.0)):
        first = round(start * sample_rate)
        end = None if duration is None else first + round(duration * sample_rate)
        part = read_audio(content, sample_rate=sample_rate, start=start, duration=duration)
        torch.testing.assert_close(part, whole[first:end], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("rate", "sample_rate"), [(441, 160), (160, 441), (441, 80)])
def test_rates_without_a_large_divisor_are_resampled_alike(rate, sample_rate, monkeypatch):
    samples = make_samples(2345)
    # In float64, since torchaudio's filters are as coarse as its input.
    whole = resample(torch.from_numpy(samples).double().mean(1), rate, sample_rate).float()
    monkeypatch.setattr(audio_files, "_MOST_FILTER_ENTRIES", 8192)
    monkeypatch.setattr(audio_files, "_make_resample", None)
    content = as_bytes(samples, rate)
    found = read_audio(content, sample_rate=sample_rate)
    torch.testing.assert_close(found, whole, atol=1e-6, rtol=0)
    blocks = list(audio_blocks(content, sample_rate=sample_rate, seconds=0.2))
    torch.testing.assert_close(torch.cat(blocks), whole, atol=1e-6, rtol=0)


def test_a_tone_of_an_odd_rate_stays_the_tone():
    tone = [np.sin(2 * np.pi * 440 * np.arange(rate) / rate) for rate in (11127, 16000)]
    found = read_audio(as_bytes(0.5 * tone[0], 11127), sample_rate=16000)
    expected = torch.from_numpy(0.5 * tone[1]).float()
    torch.testing.assert_close(found[99:-99], expected[99:-99], atol=2e-3, rtol=0)


def test_memory_is_that_of_a_block(monkeypatch):
    held = []

    make_resample = audio_files._make_resample

    def spy(old, new):
        run = make_resample(old, new)
        return lambda x: held.append(len(x)) or run(x)

    monkeypatch.setattr(audio_files, "_make_resample", spy)
    blocks = audio_blocks(as_bytes(make_samples(44100), 44100), sample_rate=16000, seconds=0.05)
    assert max(map(len, blocks)) <= 0.07 * 16000
    assert len(held) > 15
    assert max(held) <= 0.09 * 44100
    held.clear()
    monkeypatch.setattr(audio_files, "_BLOCK_SECONDS", 9.0)
    content = as_bytes(make_samples(44100), 44100)
    read_audio(content, sample_rate=16000, start=0.5, duration=0.1)
    assert sum(held) <= 0.15 * 44100, "a part is read alone"


def test_seconds_of_blocks_at_the_same_rate():
    content = as_bytes(make_samples(1000), 1000)
    blocks = audio_blocks(content, sample_rate=1000, seconds=0.3)
    assert [len(block) for block in blocks] == [300, 300, 300, 100]


def test_what_is_mended_is_told(tmp_path):
    told = []
    path = write(tmp_path / "a.wav", make_samples(), 44100)
    read_audio(path, sample_rate=16000, on_warning=told.append)
    assert told == [
        f"'{path}': 44100 Hz, resampled to 16000 Hz",
        f"'{path}': 2 channels, mixed to one",
    ]
    told.clear()
    write(path, make_samples(channels=1))
    read_audio(path, sample_rate=16000, on_warning=told.append)
    assert told == []


@pytest.mark.parametrize(("suffix", "subtype", "is_exact"), FORMATS)
@pytest.mark.parametrize("kept", [0.99, 0.6])
def test_truncated_files_are_refused(suffix, subtype, is_exact, kept, tmp_path):
    path = write(tmp_path / f"a.{suffix}", make_samples(30_000), subtype=subtype)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    for read in (
        lambda: read_audio(path, sample_rate=16000),
        lambda: list(audio_blocks(path, sample_rate=16000, seconds=0.1)),
    ):
        with pytest.raises(ValueError, match=f"'{re.escape(str(path))}' (is|cannot be).*truncated"):
            read()


def test_ogg_without_a_last_page_is_refused():
    content = as_bytes(make_samples(30_000), file_format="OGG", subtype="VORBIS")
    last_page = content.rfind(b"OggS")
    for end in (last_page, last_page + 20, last_page + 30, len(content) - 1):
        with pytest.raises(ValueError, match=f"recording of {end} bytes is truncated: its {end} b"):
            audio_info(content[:end])
    assert audio_info(content + b"junk").num_samples == 30_000


def test_sizes_that_programmes_write_while_piping_are_no_truncation():
    content = bytearray(as_bytes(make_samples()))
    at = content.index(b"data") + 4
    content[at : at + 4] = content[4:8] = b"\xff\xff\xff\xff"
    assert len(read_audio(bytes(content), sample_rate=16000)) == 9000


def test_flac_that_does_not_say_how_long_it_is_is_refused():
    content = bytearray(as_bytes(make_samples(), file_format="FLAC"))
    content[21] &= 0xF0  # 36 bits of its first block: how many samples there are
    content[22:26] = bytes(4)
    for read in (audio_info, lambda source: read_audio(source, sample_rate=8000)):
        with pytest.raises(ValueError, match=f"the header of a recording of {len(content)} bytes"):
            read(bytes(content))


def test_formats_without_seeking_are_read_from_the_beginning():
    content = as_bytes(make_samples(channels=1), file_format="WAV", subtype="GSM610")
    whole = read_audio(content, sample_rate=16000)
    assert len(whole) >= 9000
    part = read_audio(content, sample_rate=16000, start=0.25, duration=0.1)
    assert torch.equal(part, whole[4000:5600])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must have a header and samples, '.*a.wav' is empty"),
        (b"hello " * 99, "'.*a.wav' cannot be read as audio: .*Format not recognised"),
        (as_bytes(make_samples(0)), "must have samples, '.*a.wav' has none"),
    ],
    ids=["empty", "text", "no samples"],
)
def test_files_without_audio_are_refused(content, message, tmp_path):
    (tmp_path / "a.wav").write_bytes(content)
    for read in (audio_info, lambda path: read_audio(path, sample_rate=16000)):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / "a.wav")


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e30])
def test_samples_that_are_no_numbers_are_refused(value, tmp_path):
    samples = make_samples()
    samples[4000, 1] = value
    path = write(tmp_path / "a.wav", samples, subtype="FLOAT")
    message = "must be finite numbers up to .*, '.*a.wav' has others, the first at 0.250 seconds"
    with pytest.raises(ValueError, match=message):
        read_audio(path, sample_rate=8000)
    with pytest.raises(ValueError, match=message):
        list(audio_blocks(path, sample_rate=8000, seconds=0.1))
    assert len(read_audio(path, sample_rate=8000, duration=0.2)) == 1600


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.wav"):
        read_audio(tmp_path / "gone.wav", sample_rate=16000)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"start": -1.0}, ValueError, "got start=-1.0 and duration=None"),
        ({"duration": 0.0}, ValueError, "got start=0.0 and duration=0.0"),
        ({"start": 1.0}, ValueError, "within a recording of .*, got start=1.0 for 0.562 seconds"),
        ({"sample_rate": 0}, ValueError, "sample_rate must be an integer of at least 1, got 0"),
        ({"sample_rate": 16e3}, ValueError, "sample_rate must be an integer .*, got 16000.0"),
        ({"sample_rate": 9999991}, ValueError, "got 16000 Hz in a .* and sample_rate=9999991, whi"),
        ({"source": 3}, TypeError, "source must be a path, bytes or a file object, got a int"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        read_audio(**{"source": as_bytes(make_samples()), "sample_rate": 16000, **options})


def test_block_lengths_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="seconds must be a positive number, got 0"):
        next(audio_blocks(as_bytes(make_samples()), sample_rate=16000, seconds=0))


@pytest.mark.parametrize("package", ["soundfile", "torchaudio"])
def test_missing_packages_are_named(package, monkeypatch):
    content = as_bytes(make_samples())
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.functional", None)
    with pytest.raises(RuntimeError, match=f"needs {package}. Install it: pip install {package}"):
        read_audio(content, sample_rate=8000)
