"""Inputs of BEiT-3 that do not fit the model."""

import pytest
import torch
from timm.data import resolve_data_config

from tests.models.beit3_draws import TEXT_LEN, draw, make


def bad_inputs():
    image, tokens, mask = draw()
    padding = torch.zeros(3, TEXT_LEN, dtype=torch.bool)
    return [
        ({}, "got neither"),
        ({"image": image[0]}, r"\(3, 20, 20\), got \(3, 20, 20\)"),
        ({"image": image[:, :1]}, r"\(3, 20, 20\), got \(3, 1, 20, 20\)"),
        ({"image": image[..., :15]}, r"got \(3, 3, 20, 15\).*another img_size"),
        ({"image": image[:0]}, r"got \(0, 3, 20, 20\)"),
        ({"tokens": tokens[0]}, r"\(batch, text_len\).*got \(9,\)"),
        ({"tokens": tokens[:, :0]}, r"at least one token, got \(3, 0\)"),
        ({"tokens": torch.zeros(1, 14).long()}, "max_text_len=13 per text, got 14"),
        ({"tokens": tokens + 61}, "vocab_size=61, got values from"),
        ({"tokens": tokens - 61}, "vocab_size=61, got values from -"),
        ({"image": image[:2], "tokens": tokens}, "got 2 images and 3 texts"),
        ({"image": image, "text_padding_mask": padding}, "text_padding_mask needs tokens, got"),
        ({"tokens": tokens, "image_mask": mask}, "image_mask needs image, got image=None"),
        ({"image": image, "image_mask": mask[:, 1:]}, r"\(3, 16\), got \(3, 15\)"),
        ({"tokens": tokens, "text_padding_mask": padding[:2]}, r"\(3, 9\), got \(2, 9\)"),
    ]


@pytest.mark.parametrize("case", range(15))
def test_bad_inputs_are_refused(case):
    inputs, message = bad_inputs()[case]
    with pytest.raises(ValueError, match=message):
        make().forward_features(**inputs)


def test_inputs_of_another_dtype_are_refused():
    model, (image, tokens, mask) = make(), draw()
    with pytest.raises(TypeError, match=r"image must be floating, got torch\.uint8"):
        model(image.byte())
    with pytest.raises(TypeError, match=r"tokens must be int64 or int32, got torch\.float32"):
        model(tokens=tokens.float())
    with pytest.raises(TypeError, match=r"image_mask must be bool, got torch\.int64"):
        model(image, image_mask=mask.long())
    with pytest.raises(TypeError, match=r"text_padding_mask must be bool, got torch\.uint8"):
        model(tokens=tokens, text_padding_mask=torch.zeros(3, 9, dtype=torch.uint8))


def test_timm_finds_size_and_normalisation_of_images():
    found = resolve_data_config({}, model=make())
    assert found["input_size"] == (3, 20, 20)
    assert found["mean"] == found["std"] == (0.5, 0.5, 0.5)
    assert (found["crop_pct"], found["crop_mode"]) == (1.0, "squash")
