import sys

import pytest
import torch
import torchaudio
from torch.nn import functional

from longnet_zoo.factory import create_model, model_info
from longnet_zoo.models.audio_front_end import _FLOOR, LogMel, _spans
from tests.models import small_audio
from tests.models.small_audio import NUM_MELS, SAMPLES_PER_FRAME, SMALL, WAVEFORM

BOTH = pytest.mark.parametrize("options", [{}, WAVEFORM], ids=["log_mel", "waveform"])


def make(**options):
    return small_audio.make(num_layers=1, **options).front_end


def make_mel(**options):
    sizes = {"sample_rate": 1000, "window_size": 19, "hop_size": 7, "num_mels": NUM_MELS}
    return LogMel(**{**sizes, "mean": 0.0, "std": 1.0, **options})


def calls_of(front_end):
    """Collects how many samples the first layer gets at each call."""
    calls = []
    front_end.layers[0].register_forward_pre_hook(lambda _, x: calls.append(x[0].shape[-1]))
    return calls


def test_spectrogram_is_torchaudios():
    transform = torchaudio.transforms.MelSpectrogram(
        1000, n_fft=32, win_length=19, hop_length=7, n_mels=NUM_MELS, center=False
    )
    samples = torch.randn(2, 200)
    # torchaudio puts the window into the middle of the 32 samples of the transform.
    expected = (transform(functional.pad(samples, (6, 7))) + _FLOOR).log()
    assert expected.shape == (2, NUM_MELS, 26)
    torch.testing.assert_close(make_mel()(samples[:, None]), expected, atol=1e-5, rtol=1e-5)


def test_spectrogram_is_normalised_and_silence_is_the_floor():
    samples = torch.randn(2, 1, 100)
    expected = (make_mel()(samples) + 3.0) / 2.0
    torch.testing.assert_close(make_mel(mean=-3.0, std=2.0)(samples), expected)
    silence = make_mel()(torch.zeros(1, 1, 19))
    torch.testing.assert_close(silence, torch.full_like(silence, _FLOOR).log())


def test_tables_stay_exact_through_casts_and_come_to_be_after_meta():
    mel = make_mel()
    window, filters = mel.window.clone(), mel.filters.clone()
    assert mel.bfloat16().window.dtype == torch.float32
    assert torch.equal(mel.float().window, window)
    assert torch.equal(mel.half().filters, filters)
    with torch.device("meta"):
        empty = make_mel()
    assert empty.window.is_meta
    assert torch.equal(empty.to_empty(device="cpu").filters, filters)
    assert dict(mel.state_dict()) == {}


def test_half_models_hear_the_same():
    model = small_audio.make()
    waveform = small_audio.draw(20)
    expected, log_mel = model.front_end(waveform), model.log_mel(waveform)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.log_mel(waveform), log_mel)
    frames = model.bfloat16().front_end(waveform)
    assert frames.dtype == torch.bfloat16
    torch.testing.assert_close(frames.float(), expected, atol=0.1, rtol=0.05)


@BOTH
def test_frames_are_those_of_convolutions_with_zeros_at_both_ends(options):
    front_end, waveform = make(**options), small_audio.draw(20)
    x = waveform[:, None]
    for layer in front_end.layers:
        kernel, stride = layer.kernel_size, layer.stride
        total = -(-x.shape[-1] // stride)
        behind = (total - 1) * stride + kernel - (kernel - stride) // 2 - x.shape[-1]
        x = functional.pad(x, ((kernel - stride) // 2, behind))
        if isinstance(layer, LogMel):
            x = layer(x)
        else:
            x = functional.conv1d(x, layer.conv.weight, layer.conv.bias, stride)
            if options:
                x = functional.layer_norm(x.mT, x.shape[1:2], layer.norm.weight, layer.norm.bias).mT
            x = functional.gelu(x)
        assert x.shape[-1] == total
    torch.testing.assert_close(front_end(waveform), front_end.proj(x.mT), atol=1e-5, rtol=0)


@BOTH
@pytest.mark.parametrize("chunk_frames", [1, 3, 17])
def test_chunks_joined_equal_the_whole(options, chunk_frames):
    front_end, waveform = make(**options), small_audio.draw(20)
    lengths = torch.tensor([waveform.shape[1], 400])
    whole = front_end(waveform, lengths)
    front_end.chunk_frames = chunk_frames
    calls = calls_of(front_end)
    with torch.no_grad():
        chunks = front_end(waveform, lengths)
    assert len(calls) == -(-20 // chunk_frames)
    torch.testing.assert_close(chunks, whole, atol=1e-5, rtol=0)


@BOTH
def test_chunks_bound_what_is_computed_and_held_at_once(options, monkeypatch):
    front_end = make(chunk_seconds=4 * SAMPLES_PER_FRAME / 1000, **options)
    assert front_end.chunk_frames == 4
    calls, waveform = calls_of(front_end), small_audio.draw(200)
    first, end = _spans(front_end.layers, 0, 4)[0]
    runs = [
        lambda: front_end(waveform),
        lambda: front_end.embed_blocks(waveform[0].split(100)),
        lambda: front_end.embed_blocks([waveform[0]]),
    ]
    for run in runs:
        calls.clear()
        with torch.no_grad():
            run()
        assert len(calls) >= 50
        assert max(calls) <= end - first < 6 * SAMPLES_PER_FRAME
    held, make_frames = [], front_end._frames

    def spy(samples, *span, **options):
        held.append(samples.numel())
        return make_frames(samples, *span, **options)

    monkeypatch.setattr(front_end, "_frames", spy)
    front_end.embed_blocks(waveform[0].split(100))
    assert max(held) < 6 * SAMPLES_PER_FRAME


@BOTH
def test_chunks_are_computed_again_in_the_backward_pass(options):
    front_end, waveform = make(**options), small_audio.draw(20).requires_grad_()
    inputs = [waveform, *front_end.parameters()]
    cotangent = torch.randn(2, 20, small_audio.EMBED_DIM)
    whole = torch.autograd.grad((front_end(waveform) * cotangent).sum(), inputs)
    front_end.chunk_frames = 6
    calls = calls_of(front_end)
    loss = (front_end(waveform) * cotangent).sum()
    assert len(calls) == 4
    chunks = torch.autograd.grad(loss, inputs)
    assert len(calls) == 8
    for ours, expected in zip(chunks, whole, strict=True):
        atol = 1e-5 * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(ours, expected, atol=atol, rtol=0)
    assert (chunks[0] != 0).all(), "every sample is heard"


@BOTH
def test_frames_depend_on_their_spans_alone(options):
    front_end, waveform = make(**options), small_audio.draw(20, batch=1)
    before = front_end(waveform)
    spans = [_spans(front_end.layers, frame, frame + 1)[0] for frame in range(20)]
    for place in (0, 1, 41, 400, 834):
        moved = waveform.clone()
        moved[0, place] += 1.0
        changed = (front_end(moved) != before).any(-1)[0]
        sees = torch.tensor([first <= place < end for first, end in spans])
        assert sees.any()
        assert not (changed & ~sees).any()
        assert changed[place // SAMPLES_PER_FRAME]


@BOTH
def test_padded_batch_equals_the_samples_one_by_one(options):
    front_end, lengths = make(**options), [835, 421, 420, 41, 1]
    waveform = torch.randn(5, 835)
    is_padding = torch.arange(835) >= torch.tensor(lengths)[:, None]
    frames = front_end(waveform.masked_fill(is_padding, torch.nan), torch.tensor(lengths))
    for number, length in enumerate(lengths):
        alone = front_end(waveform[number : number + 1, :length])
        assert alone.shape[1] == -(-length // SAMPLES_PER_FRAME)
        ours = frames[number : number + 1, : alone.shape[1]]
        torch.testing.assert_close(ours, alone, atol=1e-5, rtol=0)


@BOTH
@pytest.mark.parametrize("size", [1, 42, 100, 833, 10_000])
def test_blocks_joined_equal_the_whole(options, size):
    front_end, waveform = make(**options), torch.randn(1, 834)
    blocks = [torch.empty(0), *waveform[0].split(size), torch.empty(0)]
    with torch.no_grad():
        torch.testing.assert_close(
            front_end.embed_blocks(iter(blocks)), front_end(waveform), atol=1e-5, rtol=0
        )


def test_no_sample_is_refused():
    with pytest.raises(ValueError, match="blocks must hold at least one sample, got none"):
        make().embed_blocks([torch.empty(0)])


def test_bands_without_a_frequency_are_refused():
    message = r"got num_mels=40 with \d+ empty bands for a window_size of 19 samples at 1000 Hz"
    with pytest.raises(ValueError, match=message):
        make_mel(num_mels=40)


def test_without_torchaudio_models_are_described_and_raw_samples_heard(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchaudio.functional", None)
    assert model_info("longnet_audio_tiny").num_params > 0
    assert make(**WAVEFORM)(small_audio.draw(3)).shape == (2, 3, small_audio.EMBED_DIM)
    with pytest.raises(RuntimeError, match="Install it: pip install torchaudio"):
        create_model("longnet_audio_tiny", **SMALL)


def test_flops_count_each_product_of_the_stem():
    d, c = small_audio.EMBED_DIM, 11
    mel = 17 * NUM_MELS * 6
    convolutions = NUM_MELS * 3 * c * 3 + c * 5 * c
    assert make().flops(10) == 2 * 10 * (mel + convolutions + c * d)
    convolutions = 9 * c * 6 + c * 7 * c
    assert make(**WAVEFORM).flops(10) == 2 * 10 * (convolutions + c * d)
