import math

import numpy as np
import pytest
import soundfile
import torch
from timm.optim import param_groups_layer_decay

from longnet_zoo.factory import create_model, model_info
from longnet_zoo.models import LongNetAudio, LongNetAudioConfig, LongNetLMConfig
from longnet_zoo.models.audio_files import read_audio
from tests.models import small_audio
from tests.models.small_audio import EMBED_DIM, SAMPLES_PER_FRAME, SMALL, WAVEFORM, draw, make

HEADS = pytest.mark.parametrize("head", ["clip", "frames", "ctc"])
BOTH = pytest.mark.parametrize("options", [{}, WAVEFORM], ids=["log_mel", "waveform"])


def assert_close(ours, expected, atol=1e-5):
    torch.testing.assert_close(ours, expected, atol=atol, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "num_params", "frame_rate", "longest_s"),
    [("longnet_audio_tiny", 890_248, 25.0, 300), ("longnet_audio_base", 87_701_768, 50.0, 3600)],
)
def test_sizes(name, num_params, frame_rate, longest_s):
    with torch.device("meta"):
        model = create_model(name, num_classes=8)
    assert model.num_params() == num_params
    assert model.frame_rate == model.config.frame_rate == frame_rate
    assert model.config.sample_rate == 16000
    assert model.config.pattern.segment_lengths[-1] >= longest_s * frame_rate
    info = model_info(name)
    assert (info.family, info.modality) == ("longnet_audio", "audio")


@HEADS
@pytest.mark.parametrize("num_classes", [0, 5])
def test_outputs_have_the_shape_of_the_head(head, num_classes):
    model, waveform = make(head=head, num_classes=num_classes), draw(9)
    outputs = num_classes or EMBED_DIM
    assert model(waveform).shape == ((2, outputs) if head == "clip" else (2, 9, outputs))
    assert model.forward_features(waveform).shape == (2, 9, EMBED_DIM)
    assert (model.num_classes, model.num_features, model.embed_dim) == (
        num_classes,
        EMBED_DIM,
        EMBED_DIM,
    )


def test_frames_are_counted_and_timed():
    model = make()
    for samples in (1, 41, 42, 43, 835):
        frames = model.num_frames(samples)
        assert frames == math.ceil(samples / SAMPLES_PER_FRAME)
        assert model.forward_features(torch.randn(1, samples)).shape[1] == frames
    assert model.frame_rate == pytest.approx(1000 / SAMPLES_PER_FRAME)
    expected = torch.tensor([0.021, 0.063, 0.105], dtype=torch.float64)
    assert_close(model.frame_times(3), expected, atol=1e-12)
    padding = model.frame_padding(torch.tensor([42, 43, 126]), 3)
    assert padding.tolist() == [[False, True, True], [False, False, True], [False, False, False]]


@BOTH
@HEADS
def test_padded_batch_equals_the_samples_one_by_one(head, options):
    model, lengths = make(head=head, num_classes=5, **options), [1675, 1000, 300, 1]
    waveform = torch.randn(4, 1675)
    is_padding = torch.arange(1675) >= torch.tensor(lengths)[:, None]
    logits = model(waveform.masked_fill(is_padding, torch.nan), torch.tensor(lengths))
    assert logits.isfinite().all()
    for number, length in enumerate(lengths):
        alone = model(waveform[number : number + 1, :length])[0]
        ours = logits[number] if head == "clip" else logits[number, : len(alone)]
        assert_close(ours, alone)


def test_heads_read_features():
    model, waveform = make(num_classes=5), draw(9)
    lengths = torch.tensor([373, 200])
    features = model.forward_features(waveform, lengths)
    means = torch.stack([features[0].mean(0), features[1, :5].mean(0)])
    padding = model.frame_padding(lengths, 9)
    embedding = model.forward_head(features, True, key_padding_mask=padding)
    assert_close(embedding, model.fc_norm(means))
    assert_close(model(waveform, lengths), model.head(embedding))
    model.reset_classifier(3, "frames")
    assert model.config.head == "frames"
    assert_close(model(waveform, lengths), model.head(features))
    model.bfloat16().reset_classifier(4)
    assert (model.config.num_classes, model.config.head) == (4, "frames")
    assert model.get_classifier().weight.dtype == torch.bfloat16
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), torch.nn.Identity)


def test_encoder_is_bidirectional_and_knows_the_order():
    model, waveform = make(), draw(20, batch=1)
    features = model.forward_features(waveform)
    moved = waveform.clone()
    moved[0, -40:] += 1.0
    assert not torch.allclose(model.forward_features(moved)[:, 0], features[:, 0], atol=1e-4)
    model = make(segment_lengths=(100,), dilation_rates=(1,))
    frames = model.front_end(waveform)
    ours = model.forward_frames(frames.flip(1)).flip(1)
    assert not torch.allclose(ours, model.forward_frames(frames), atol=1e-2)


@HEADS
@BOTH
def test_every_parameter_gets_a_gradient_and_padding_none(head, options):
    model, waveform = make(head=head, num_classes=5, **options), draw(9).requires_grad_()
    lengths = torch.tensor([373, 200])
    logits = model(waveform, lengths)
    if head != "clip":
        logits = logits.masked_fill(model.frame_padding(lengths, 9)[..., None], 0.0)
    logits.square().sum().backward()
    missing = [name for name, x in model.named_parameters() if not x.grad.abs().sum() > 0]
    # The softmax ignores key biases.
    assert [name for name in missing if "k_proj.bias" not in name] == []
    assert (waveform.grad[1, 200:] == 0).all()
    assert (waveform.grad[1, :200] != 0).all()


def test_dropout_acts_on_frames_and_before_the_head():
    model, waveform = make(num_classes=5, dropout=0.5), draw(9)
    assert torch.equal(model(waveform), model(waveform))
    assert not torch.allclose(model.train()(waveform), model(waveform), atol=1e-3)
    model = make(num_classes=5, head_dropout=0.5)
    assert torch.equal(model(waveform), model(waveform))
    assert not torch.allclose(model.train()(waveform), model(waveform), atol=1e-3)


def test_flops_count_frames_stem_blocks_and_head():
    model = make(num_classes=5)
    d, f = EMBED_DIM, 40
    attention, _ = model.config.pattern.flops(50, 4, 6)
    blocks = 2 * 50 * 2 * (4 * d * d + 2 * d * f) + 2 * attention
    assert model.flops(50) == model.front_end.flops(50) + blocks + 2 * d * 5
    model.reset_classifier(5, "frames")
    assert model.flops(50) == model.front_end.flops(50) + blocks + 50 * 2 * d * 5


def test_layer_decay_groups_every_parameter():
    model = make(num_classes=5)
    assert "front_end.layers.1.conv.bias" in model.no_weight_decay()
    assert "front_end.layers.1.conv.weight" not in model.no_weight_decay()
    groups = param_groups_layer_decay(model, weight_decay=0.1, layer_decay=0.5)
    scale_of = {
        id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]
    }
    assert len(scale_of) == len(list(model.parameters()))
    for early, late in (
        (model.front_end.proj.weight, model.stack.blocks[0].attention.q_proj.weight),
        (
            model.stack.blocks[0].attention.q_proj.weight,
            model.stack.blocks[1].attention.q_proj.weight,
        ),
    ):
        assert scale_of[id(early)] < scale_of[id(late)]
    for norm in (model.stack.norm, model.fc_norm):
        last = model.stack.blocks[1].attention.q_proj.weight
        assert scale_of[id(norm.weight)] == scale_of[id(last)] < scale_of[id(model.head.weight)]
    assert list(model.group_matcher(coarse=True)["blocks"][0]) == [r"^stack\.blocks", None]


def test_grad_checkpointing_changes_no_gradient():
    model, waveform, grads = make(num_classes=5), draw(9), []
    for is_on in (False, True):
        model.set_grad_checkpointing(is_on)
        model.zero_grad()
        model(waveform).square().sum().backward()
        grads.append({name: x.grad.clone() for name, x in model.named_parameters()})
    torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=1e-5)


def test_saved_model_comes_back(tmp_path):
    model, waveform = make(num_classes=5, head="ctc", blank_id=4), draw(9)
    model.save_pretrained(tmp_path)
    loaded = LongNetAudio.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(loaded(waveform), model(waveform))
    with pytest.raises(TypeError, match="LongNetAudio takes a LongNetAudioConfig, got LongNetLMC"):
        LongNetAudio(LongNetLMConfig())


def test_log_mel_is_the_spectrogram_before_it_is_normalised():
    model, waveform = make(log_mel_mean=-2.0, log_mel_std=3.0), draw(9)
    columns = model.log_mel(waveform)
    assert columns.shape == (2, -(-waveform.shape[1] // 7), small_audio.NUM_MELS)
    assert_close(make(log_mel_mean=1.0).log_mel(waveform), columns)
    inside = torch.nn.functional.pad(waveform, (6, 13))[:, None]
    assert_close(model.front_end.layers[0](inside)[:, :, :50] * 3 - 2, columns[:, :50].mT)
    model.front_end.chunk_frames = 2
    assert_close(model.log_mel(waveform, torch.tensor([373, 373])), columns)
    with pytest.raises(ValueError, match="with front_end='log_mel', got 'waveform'"):
        make(**WAVEFORM).log_mel(waveform)


def test_a_louder_or_higher_sound_is_a_brighter_or_higher_band():
    model = create_model("longnet_audio_tiny")
    seconds = torch.arange(16000) / 16000
    tones = torch.stack([torch.sin(2 * math.pi * f * seconds) for f in (300.0, 1000.0, 5000.0)])
    bands = model.log_mel(tones)[:, 10:-10].mean(1)
    assert (bands.argmax(-1).diff() > 5).all()
    assert_close(
        model.log_mel(10 * tones)[:, 50].amax(-1) - model.log_mel(tones)[:, 50].amax(-1),
        torch.full((3,), math.log(100.0)),
        atol=1e-3,
    )


def test_ctc_learns_to_spell():
    """Two tones with silence between them, told by the text alone."""
    options = {"segment_lengths": (64,), "dilation_rates": (1,), "embed_dim": 64, "num_layers": 1}
    model = create_model("longnet_audio_tiny", num_classes=4, head="ctc", blank_id=3, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    texts = torch.tensor([[0, 1], [1, 0], [2, 2], [1, 2]])
    seconds = torch.arange(4000) / 16000
    tones = torch.stack([torch.sin(2 * math.pi * f * seconds) for f in (300.0, 1000.0, 4000.0)])
    silence = torch.zeros(4, 2000)
    waveform = torch.cat([tones[texts[:, 0]], silence, tones[texts[:, 1]], silence], dim=1)
    waveform = waveform + 0.01 * torch.randn_like(waveform)
    lengths, target_lengths = torch.tensor([12000, 12000, 12000, 10500]), torch.full((4,), 2)
    losses = []
    for _ in range(120):
        loss = model.ctc_loss(waveform, lengths, texts, target_lengths)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 < losses[0]
    for beam_size in (None, 4):
        found = model.eval().transcribe(waveform, lengths, beam_size=beam_size)
        assert [x.ids for x in found] == texts.tolist()
        # The second tone begins after 0.375 seconds; a frame sees a bit of what follows.
        times = [model.frame_times(19)[x.frames].tolist() for x in found]
        assert all(0 < first < 0.35 < second < 0.7 for first, second in times)


def test_transcripts_read_own_frames_only():
    model, waveform = make(head="ctc", num_classes=5), draw(20)
    found = model.transcribe(waveform, torch.tensor([835, 300]))
    (alone,) = model.transcribe(waveform[1:, :300])
    assert (found[1].ids, found[1].frames) == (alone.ids, alone.frames)
    assert found[1].log_prob == pytest.approx(alone.log_prob, rel=1e-5)


def test_text_needs_a_head_for_it_and_frames_enough():
    waveform, text = draw(3), torch.tensor([[1, 1, 1], [1, 2, 1]])
    for options in ({"head": "frames", "num_classes": 5}, {"head": "ctc"}):
        model = make(**options)
        message = f"got '{options['head']}' and {model.num_classes}. Call reset_classifier"
        with pytest.raises(ValueError, match=message):
            model.transcribe(waveform)
    model = make(head="ctc", num_classes=5)
    lengths = torch.tensor([121, 100])
    with pytest.raises(ValueError, match="3 symbols with 2 repeats for the 3 frames of sample 0"):
        model.ctc_loss(waveform, None, text, torch.tensor([3, 3]))
    assert model.ctc_loss(waveform, lengths, text, torch.tensor([2, 3])).isfinite()
    with pytest.raises(ValueError, match="for the 2 frames of sample 1"):
        model.ctc_loss(waveform, lengths.sub(30), text, torch.tensor([1, 3]))


def test_an_hour_would_go_through_by_blocks(tmp_path):
    """Three minutes of stereo at another rate, as a file: the frames are all that is held."""
    pattern = {"segment_lengths": (128, 1024), "dilation_rates": (1, 8)}
    model = create_model("longnet_audio_tiny", num_layers=1, num_classes=3, **pattern).eval()
    samples = 0.1 * np.random.default_rng(0).standard_normal((180 * 22050, 2), dtype=np.float32)
    path = tmp_path / "long.wav"
    soundfile.write(path, samples, 22050)
    sizes = []
    model.front_end.layers[0].register_forward_pre_hook(lambda _, x: sizes.append(x[0].shape[-1]))
    features = model.file_features(path)
    assert features.shape == (1, 180 * 25, 128)
    assert not features.requires_grad
    assert max(sizes) < 31 * 16000
    with torch.no_grad():
        whole = model.forward_features(read_audio(path, sample_rate=16000)[None])
    assert_close(features, whole, atol=1e-4)
    assert_close(model.embed_file(path), whole.mean(1)[0], atol=1e-4)
    assert model.forward_head(features).shape == (1, 3)


@pytest.mark.parametrize(
    ("waveform", "lengths", "error", "message"),
    [
        (torch.zeros(2, 9, dtype=torch.int16), None, TypeError, "got torch.int16. Divide int16 by"),
        ([0.0], None, TypeError, r"a tensor \(batch, samples\), got list. Use torch.as_tensor"),
        (torch.zeros(9), None, ValueError, r"got \(9,\). Add the batch with waveform\[None\]"),
        (torch.zeros(2, 1, 9), None, ValueError, r"got \(2, 1, 9\). Mix channels with waveform.m"),
        (torch.zeros(2, 0), None, ValueError, r"at least one sample, got \(2, 0\)"),
        (torch.zeros(2, 9), torch.tensor([9, 0]), ValueError, "the 9 of .*values from 0 to 9"),
        (torch.zeros(2, 9), torch.tensor([3, 10]), ValueError, "the 9 of .*values from 3 to 10"),
        (torch.zeros(2, 9), torch.tensor([9]), ValueError, r"\(batch,\)=\(2,\), got \(1,\)"),
        (torch.zeros(2, 9), torch.ones(2), TypeError, "int64 .*got torch.float32"),
        (torch.zeros(2, 9), [9, 9], TypeError, "lengths must be a tensor of int64 .*got list"),
        (
            torch.tensor([[0.0, 1.0], [2.0, math.nan]]),
            None,
            ValueError,
            "got nan at sample 1 of",
        ),
        (torch.tensor([[0.0, -math.inf]]), None, ValueError, "got -inf at sample 1 of number 0"),
    ],
)
def test_sound_that_cannot_be_is_refused(waveform, lengths, error, message):
    model = make(**WAVEFORM)
    for run in (model, model.forward_features):
        with pytest.raises(error, match=message):
            run(waveform, lengths)


@pytest.mark.parametrize(
    ("block", "error", "message"),
    [
        (torch.zeros(1, 9), ValueError, r"blocks must be tensors \(samples,\), got \(1, 9\)"),
        ([0.0], ValueError, "blocks must be tensors .* got list"),
        (torch.zeros(9, dtype=torch.int16), TypeError, "got torch.int16"),
        (torch.full((9,), math.nan), ValueError, "got nan at sample 0"),
    ],
)
def test_blocks_that_cannot_be_are_refused(block, error, message):
    with pytest.raises(error, match=message):
        make(**WAVEFORM).embed_blocks([torch.zeros(5), block])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sample_rate": 0}, ValueError, "sample_rate must be .* at least 1, got 0"),
        ({"hop_size": 20}, ValueError, "got window_size=19 and hop_size=20"),
        ({"num_mels": 2.0}, TypeError, r"num_mels must be .*got 2.0 \(float\)"),
        ({"front_end": "mfcc"}, ValueError, "one of 'log_mel', 'waveform', got 'mfcc'"),
        ({"head": "text"}, ValueError, "one of 'clip', 'frames', 'ctc', got 'text'"),
        ({"conv_strides": (4, 3)}, ValueError, "got a stride of 4 for a kernel of 3"),
        ({"conv_strides": (2, 0)}, ValueError, "got a stride of 0 for a kernel of 5"),
        (
            {"conv_strides": (2,)},
            ValueError,
            r"got conv_kernels=\(3, 5\) and conv_strides=\(2,\)",
        ),
        ({"conv_strides": ()}, ValueError, r"conv_strides must have at least one entry, got \(\)"),
        ({"conv_kernels": 3}, TypeError, "conv_kernels must be a tuple of integers or None, got 3"),
        ({"conv_kernels": (3, 5.0)}, TypeError, r"conv_kernels must be .*got \(3, 5.0\)"),
        ({"conv_dim": 0}, ValueError, "conv_dim must be .*got 0"),
        ({"log_mel_std": 0.0}, ValueError, "log_mel_std must be a positive number, got 0.0"),
        ({"log_mel_mean": "a"}, TypeError, "log_mel_mean must be a finite number, got 'a'"),
        ({"log_mel_mean": math.nan}, ValueError, "log_mel_mean must be a finite number, got nan"),
        ({"chunk_seconds": 0}, ValueError, "chunk_seconds must be a positive number, got 0"),
        ({"rotary_base": 1.0}, ValueError, "rotary_base must be above 1, got 1.0"),
        ({"num_heads": 8}, ValueError, "even head_dim .*got embed_dim=24 and num_heads=8"),
        ({"head_dropout": 1.0}, ValueError, "head_dropout must be .*got 1.0"),
        ({"num_classes": -1}, ValueError, "num_classes must be .*got -1"),
        (
            {"head": "ctc", "num_classes": 5, "blank_id": 5},
            ValueError,
            "got blank_id=5 and num_classes=5",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        create_model("longnet_audio_tiny", **{**SMALL, **options})


def test_options_of_the_front_end_have_defaults_that_fit_it():
    options = {**SMALL, "conv_kernels": None, "conv_strides": None}
    config = LongNetAudioConfig(**options)
    assert config.convolutions == ((3, 1), (3, 2))
    config = LongNetAudioConfig(**options, front_end="waveform")
    assert config.samples_per_frame == math.prod((5, 2, 2, 2, 2, 2, 2)) == 320
    listed = {**options, "conv_kernels": [3, 5], "conv_strides": [2, 3]}
    assert LongNetAudioConfig(**listed) == LongNetAudioConfig(**SMALL)


@pytest.mark.gpu
@HEADS
@BOTH
def test_gpu_gives_what_the_cpu_gives(head, options):
    model, waveform = make(head=head, num_classes=5, **options), draw(30)
    lengths = torch.tensor([1255, 700])
    own = slice(None) if head == "clip" else slice(model.num_frames(700))
    expected = model(waveform, lengths)
    model.to("cuda").front_end.chunk_frames = 7
    for place in (lengths, lengths.cuda()):
        ours = model(waveform.cuda(), place).cpu()
        torch.testing.assert_close(ours[:, own], expected[:, own], atol=1e-3, rtol=1e-3)
    if head == "ctc":
        text = torch.tensor([[1, 2], [3, 0]]).cuda(), torch.tensor([2, 1]).cuda()
        assert model.ctc_loss(waveform.cuda(), lengths.cuda(), *text).isfinite()
        assert len(model.transcribe(waveform.cuda(), lengths.cuda(), beam_size=2)) == 2
