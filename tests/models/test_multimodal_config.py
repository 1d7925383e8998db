"""Options of the multimodal model: kinds of modalities, JSON, and what is refused."""

from dataclasses import asdict

import pytest

from longnet_zoo.models import (
    AudioModality,
    FeaturesModality,
    FramesModality,
    ImageModality,
    LongNetMultimodalConfig,
    TextModality,
)

from .small_multimodal import SMALL


def make(**options):
    return LongNetMultimodalConfig(**{**SMALL, **options})


def test_mappings_become_configs_of_their_kinds():
    config = make()
    kinds = (FramesModality, AudioModality, TextModality, FeaturesModality, ImageModality)
    assert tuple(map(type, config.parts)) == kinds
    assert config.names == ("video", "sound", "question", "tiles", "photo")
    assert make(modalities=config.parts) == config
    assert config.parts[0].segment_lengths == (7, 16)
    assert LongNetMultimodalConfig(**asdict(config)) == config
    pattern = make(head_offset="block", padded_keys="zero").pattern_of(config.parts[0])
    assert (pattern.head_offset, pattern.padded_keys) == ("block", "zero")
    assert pattern.segment_lengths == (7, 16)


def test_sound_knows_its_rate():
    audio = AudioModality(name="a", sample_rate=8000, hop_size=100, conv_strides=[2, 4])
    assert audio.frame_rate == 10.0
    assert audio.convolutions == ((3, 2), (5, 4))


FEATURES = {"kind": "features", "name": "a", "input_dim": 3}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"modalities": ()}, ValueError, r"at least one, got \[\]"),
        ({"modalities": (FEATURES, FEATURES)}, ValueError, "different names, got a, a"),
        ({"modalities": ({"kind": "smell"},)}, ValueError, "one of 'image', .*got 'smell'"),
        ({"modalities": ("video",)}, TypeError, "a config or a mapping of options, got 'video'"),
        ({"modalities": ({**FEATURES, "size": 3},)}, TypeError, "among name, .*unknown 'size' in"),
        ({"modalities": ({"kind": "features", "name": "a"},)}, TypeError, "got no input_dim in"),
        ({"modalities": ({**FEATURES, "segment_lengths": 64},)}, TypeError, "of integers, got 64"),
        ({"modalities": 5}, TypeError, "modalities must be a tuple of .*, got 5"),
        ({"modalities": ({**FEATURES, "name": "training"},)}, ValueError, r"got \['training'\]"),
        ({"norm": "deepnorm"}, ValueError, "must be 'sub_ln' or 'pre_ln' here, got 'deepnorm'"),
        ({"embed_dim": 12}, ValueError, "even head_dim.*embed_dim=12 and num_heads=4"),
        ({"global_pool": ""}, ValueError, "'avg', 'query', got ''"),
        ({"modality_dropout": 1.0}, ValueError, r"modality_dropout must be .*\[0, 1\), got 1.0"),
        ({"num_classes": -1}, ValueError, "num_classes .* at least 0, got -1"),
        ({"time_rate": 0}, ValueError, "time_rate must be a positive number, got 0"),
    ],
)
def test_model_options_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (TextModality, {"name": "a b"}, r"names like those of variables .*got \['a b'\]"),
        (TextModality, {"num_layers": -1}, "num_layers .*at least 0, got -1"),
        (TextModality, {"vocab_size": 0}, "vocab_size .*at least 1, got 0"),
        (TextModality, {"kind": "image"}, "kind must be one of 'text', got 'image'"),
        (FeaturesModality, {"input_dim": 0}, "input_dim .*at least 1, got 0"),
        (ImageModality, {"img_size": 30}, "a multiple of patch_size=8, got 30"),
        (FramesModality, {"frame_rate": -1.0}, "frame_rate must be a positive number, got -1"),
        (AudioModality, {"conv_strides": ()}, r"conv_strides must be integers .*got \(\)"),
        (AudioModality, {"conv_strides": 2}, "conv_strides must be integers .*got 2"),
        (AudioModality, {"log_mel_mean": float("nan")}, "log_mel_mean must be a finite .*got nan"),
        (AudioModality, {"window_size": 100}, "window_size=100 and hop_size=160"),
        (AudioModality, {"segment_lengths": (8, 4)}, "8, 4"),
    ],
)
def test_modality_options_are_checked(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**{"name": "a", **options})
