"""The programme that open_clip's users would write, and its parts."""

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from longnet_zoo.batch_tokenizer import get_tokenizer
from longnet_zoo.image_text import (
    as_rgb,
    create_model_and_transforms,
    zero_shot_classifier,
    zero_shot_logits,
)
from tests.models.small_clip import OUTPUT_DIM, SMALL, draw, make

NAMES, TEMPLATES = ["cat", "red bus", "owl"], ["a {}.", lambda name: f"{name}, a photo"]


@pytest.fixture
def tokenizer():
    return get_tokenizer("longnet_clip_tiny", context_length=40)


def picture(mode="RGB", size=(90, 50)):
    noise = np.random.default_rng(0).integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def test_programme_of_open_clips_readme(tmp_path):
    picture().save(tmp_path / "diagram.png")
    model, _, preprocess = create_model_and_transforms("longnet_clip_tiny")
    model.eval()
    tokenizer = get_tokenizer("longnet_clip_tiny")
    image = preprocess(Image.open(tmp_path / "diagram.png")).unsqueeze(0)
    text = tokenizer(["a diagram", "a dog", "a cat"])
    with torch.no_grad():
        image_features = model.encode_image(image)
        text_features = model.encode_text(text)
        image_features /= image_features.norm(dim=-1, keepdim=True)
        text_features /= text_features.norm(dim=-1, keepdim=True)
        text_probs = (100.0 * image_features @ text_features.T).softmax(dim=-1)
    assert text_probs.shape == (1, 3)
    torch.testing.assert_close(text_probs.sum(), torch.tensor(1.0))
    again, texts_again, _ = model(image, text)
    torch.testing.assert_close(again, image_features)
    torch.testing.assert_close(texts_again, text_features)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
def test_transforms_take_pictures_of_every_mode(mode):
    _, train, evaluate = create_model_and_transforms("longnet_clip_tiny", **SMALL)
    for transform in (train, evaluate):
        image = transform(picture(mode))
        assert image.shape == (3, 28, 20)
        assert image.dtype == torch.float32
        assert -3 < image.min() < 0 < image.max() < 3


@pytest.mark.parametrize(
    ("mode", "dtype"), [("I;16", np.uint16), ("I", np.int32), ("F", np.float32)]
)
def test_transforms_refuse_pictures_that_would_become_white(mode, dtype):
    image = Image.fromarray(np.full((50, 90), 30000, dtype))
    for transform in create_model_and_transforms("longnet_clip_tiny", **SMALL)[1:]:
        with pytest.raises(ValueError, match=f"8 bits a channel, got Pillow's mode '{mode}'"):
            transform(image)


def test_pictures_are_upright_and_on_white_where_they_are_transparent():
    pixels = np.zeros((2, 3, 4), np.uint8)
    pixels[0, 0] = (255, 0, 0, 255)
    image = Image.fromarray(pixels)
    image.getexif()[ExifTags.Base.Orientation] = 6  # to be turned to the right
    rgb = as_rgb(image)
    assert image.size == (3, 2)
    assert rgb.size == (2, 3)
    found = np.array(rgb)
    assert found[0, 1].tolist() == [255, 0, 0]
    found[0, 1] = 255
    assert (found == 255).all()


def test_transforms_are_for_rgb_images_only():
    options = {**SMALL, "image": {**SMALL["image"], "in_chans": 1}}
    with pytest.raises(ValueError, match=r"must have in_chans=3, got 1\. Use create_model"):
        create_model_and_transforms("longnet_clip_tiny", **options)


def test_evaluation_shows_the_whole_image_and_training_crops_little_and_never_flips():
    _, train, evaluate = create_model_and_transforms("longnet_clip_tiny")
    left = np.zeros((64, 64, 3), np.uint8)
    left[:, :32] = 255
    left = Image.fromarray(left)
    seen = evaluate(left)
    assert torch.equal(evaluate(left), seen)
    assert seen[:, :, :31].min() > 0 > seen[:, :, 33:].max()
    crops = [train(left) for _ in range(20)]
    assert any(not torch.equal(crop, crops[0]) for crop in crops)
    for crop in crops:
        assert crop[:, :, :20].min() > 0 > crop[:, :, 44:].max()
        assert set(crop[:, :, 0].flatten().tolist()) == set(seen[:, :, 0].flatten().tolist())


def test_options_and_weights_reach_the_model(tmp_path):
    saved = make()
    saved.save_pretrained(tmp_path)
    model, _, _ = create_model_and_transforms("longnet_clip_tiny", tmp_path, **SMALL)
    assert model.training
    assert model.config == saved.config
    assert torch.equal(model.text_projection.weight, saved.text_projection.weight)


def test_classifier_is_the_mean_over_templates(tokenizer):
    model = make(text={**SMALL["text"], "dropout": 0.5})
    for batch_size in (1, 4, 100):
        weights = zero_shot_classifier(model, tokenizer, NAMES, TEMPLATES, batch_size=batch_size)
        assert model.training
        assert weights.shape == (OUTPUT_DIM, 3)
        model.eval()
        for i, name in enumerate(NAMES):
            texts = tokenizer([f"a {name}.", f"{name}, a photo"])
            mean = model.encode_text(texts, normalize=True).mean(dim=0)
            torch.testing.assert_close(weights[:, i], mean / mean.norm(), atol=1e-5, rtol=1e-5)
        model.train()


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_logits_are_scaled_cosines(loss, tokenizer):
    model, (image, _) = make(loss=loss, image={**SMALL["image"], "dropout": 0.5}), draw()
    weights = zero_shot_classifier(model, tokenizer, NAMES, ["{}"])
    logits = zero_shot_logits(model, image, weights)
    assert model.training
    cosines = model.eval().encode_image(image, normalize=True) @ weights
    expected = cosines / 0.07 if loss == "softmax" else 10 * cosines - 10
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert not weights.requires_grad
    assert not logits.requires_grad


def test_a_failing_tokenizer_leaves_the_mode(tokenizer):
    model = make()
    with pytest.raises(TypeError, match="must be strings, got 7"):
        zero_shot_classifier(model, tokenizer, ["a"], [lambda name: 7])
    assert model.training


def test_bad_input_is_refused(tokenizer):
    model = make()
    with pytest.raises(ValueError, match=r"got 'longvit_tiny_patch8_64', a vision model. Use"):
        create_model_and_transforms("longvit_tiny_patch8_64")
    with pytest.raises(ValueError, match=r"at least one each, got 0 and 1"):
        zero_shot_classifier(model, tokenizer, [], ["{}"])
    with pytest.raises(ValueError, match=r"at least one each, got 1 and 0"):
        zero_shot_classifier(model, tokenizer, ["a"], [])
    with pytest.raises(ValueError, match=r"in the place of the name, got 'a photo'"):
        zero_shot_classifier(model, tokenizer, ["a"], ["a photo"])
    with pytest.raises(TypeError, match=r"sequences of texts, got one text, 'a {}'\. Put it"):
        zero_shot_classifier(model, tokenizer, ["a"], "a {}")
    with pytest.raises(TypeError, match=r"sequences of texts, got one text, 'cat'"):
        zero_shot_classifier(model, tokenizer, "cat", ["{}"])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        zero_shot_classifier(model, tokenizer, ["a"], ["{}"], batch_size=0)
