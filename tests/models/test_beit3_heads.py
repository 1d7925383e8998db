"""Heads of BEiT-3 against plain formulas."""

import math

import pytest
import torch
from torch.nn import functional

from longnet_zoo.models import BEiT3
from tests.models.beit3_draws import (
    ALL_HEADS,
    NUM_PATCHES,
    NUM_VISUAL_TOKENS,
    TEXT_LEN,
    draw,
    draw_training,
    make,
)


def norm(x, module):
    return functional.layer_norm(x, x.shape[-1:], module.weight, module.bias, eps=1e-5)


def shake(model):
    """Moves LayerNorms and biases off their initial values, so that each of them matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)


# --- Classification ---


def test_first_token_is_pooled_and_classified():
    model = make(num_classes=5)
    shake(model)
    image, tokens, _ = draw()
    features = model.forward_features(image, tokens)
    head = model.classifier
    pooled = torch.tanh(head.pooler(norm(features[:, 0], head.norm)))
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)
    first, hidden_norm, _, last = model.get_classifier()
    expected = last(functional.gelu(norm(first(pooled), hidden_norm)))
    torch.testing.assert_close(model(image, tokens), expected)
    assert torch.equal(model.get_classifier()(pooled), model(image, tokens))
    assert model(tokens=tokens).shape == model(image).shape == (3, 5)


def test_mean_of_patches_is_classified():
    model = make(num_classes=5, global_pool="avg")
    shake(model)
    image, tokens, _ = draw()
    for features in (model.forward_features(image), model.forward_features(image, tokens)):
        mean = features[:, 1 : 1 + NUM_PATCHES].mean(dim=1)
        pooled = norm(mean, model.classifier.norm)
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)
        torch.testing.assert_close(model.forward_head(features), model.get_classifier()(pooled))
    assert model.get_classifier().weight.shape == (5, 24)


def test_mean_of_patches_needs_an_image():
    model, tokens = make(global_pool="avg"), draw()[1]
    with pytest.raises(ValueError, match=r"global_pool='avg' .* got image=None"):
        model(tokens=tokens)
    with pytest.raises(ValueError, match=r"1 \+ 16 tokens, got 9 tokens"):
        model.forward_head(model.forward_features(tokens=tokens))


@pytest.mark.parametrize("global_pool", ["token", "avg"])
def test_reset_classifier(global_pool):
    model = make(**ALL_HEADS)
    image, tokens, _ = draw()
    features = model.forward_features(image, tokens)
    model.reset_classifier(7, global_pool)
    assert model.num_classes == 7
    assert torch.equal(model.forward_features(image, tokens), features)
    assert model(image, tokens).shape == (3, 7)
    # The config describes the new model.
    again = BEiT3(model.config)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(image, tokens), model(image, tokens))
    model.reset_classifier(2)
    assert model.config.global_pool == global_pool

    model.reset_classifier(0)
    assert model.get_classifier() is None
    pooled = features[:, 0] if global_pool == "token" else features[:, 1:17].mean(dim=1)
    assert torch.equal(model(image, tokens), pooled)
    assert torch.equal(model.forward_head(features, pre_logits=True), pooled)


def test_new_classifier_has_the_dtype_of_the_model():
    model = make().to(torch.float64)
    model.reset_classifier(4)
    assert {x.dtype for x in model.classifier.parameters()} == {torch.float64}
    with pytest.raises(ValueError, match=r"num_classes must be .* got -1"):
        model.reset_classifier(-1)
    with pytest.raises(ValueError, match=r"global_pool must be .* got 'max'"):
        model.reset_classifier(4, "max")
    with pytest.raises(TypeError, match=r"num_classes must be .*got 2\.0"):
        model.reset_classifier(2.0)


# --- Masked modelling ---


def test_masked_logits_are_those_of_masked_places():
    model = make(**ALL_HEADS)
    image, tokens, mask = draw()
    text_mask = torch.rand(3, TEXT_LEN) < 0.5
    features = model.forward_features(image, tokens, image_mask=mask)
    logits = model.masked_image_logits(features, mask)
    assert logits.shape == (mask.sum(), NUM_VISUAL_TOKENS)
    places = mask.nonzero()
    for row in (0, len(places) // 2, -1):
        b, patch = places[row]
        torch.testing.assert_close(logits[row], model.masked_image_head(features[b, 1 + patch]))
    logits = model.masked_text_logits(features, text_mask)
    assert logits.shape == (text_mask.sum(), 61)
    b, token = text_mask.nonzero()[-1]
    torch.testing.assert_close(logits[-1], model.masked_text_head(features[b, 17 + token]))
    alone = model.forward_features(tokens=tokens)
    assert model.masked_text_logits(alone, text_mask).shape == logits.shape


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_masked_loss_is_the_cross_entropy_of_the_masked_logits(chunk_size):
    model = make(**ALL_HEADS)
    shake(model)
    image, tokens, mask, labels, _ = draw_training()
    text_mask = torch.rand(3, TEXT_LEN) < 0.5
    text_labels = torch.randint(61, (3, TEXT_LEN)).masked_fill(~text_mask, -1)
    padding = torch.arange(TEXT_LEN).expand(3, -1) >= 7
    text_labels = text_labels.masked_fill(padding, -1)

    features = model.forward_features(image, tokens, image_mask=mask, text_padding_mask=padding)
    of_image = functional.cross_entropy(model.masked_image_logits(features, mask), labels[mask])
    has_label = text_labels >= 0
    of_text = functional.cross_entropy(
        model.masked_text_logits(features, has_label), text_labels[has_label]
    )
    inputs = {"image_mask": mask, "text_padding_mask": padding}
    options = {"ignore_index": -1, "chunk_size": chunk_size}
    loss = model.masked_loss(
        image, tokens, **inputs, image_labels=labels, text_labels=text_labels, **options
    )
    torch.testing.assert_close(loss, of_image + of_text)
    loss = model.masked_loss(image, tokens, **inputs, image_labels=labels, **options)
    torch.testing.assert_close(loss, of_image)
    loss = model.masked_loss(image, tokens, **inputs, text_labels=text_labels, **options)
    torch.testing.assert_close(loss, of_text)


def test_masked_loss_of_one_modality():
    model = make(**ALL_HEADS)
    image, tokens, mask, labels, _ = draw_training()
    features = model.forward_features(tokens=tokens)
    logits = model.masked_text_head(features).flatten(0, 1)
    expected = functional.cross_entropy(logits, tokens.flatten())
    torch.testing.assert_close(model.masked_loss(tokens=tokens, text_labels=tokens), expected)
    none = torch.zeros_like(mask)
    assert model.masked_loss(image, image_mask=none, image_labels=labels) == 0.0
    assert model.masked_loss(image, image_mask=mask, image_labels=labels) > 1.0


def test_labels_that_do_not_fit_are_refused():
    model = make(**ALL_HEADS)
    image, tokens, mask, labels, _ = draw_training()
    with pytest.raises(ValueError, match="image_labels, text_labels or both, got neither"):
        model.masked_loss(image, tokens)
    with pytest.raises(ValueError, match="image_labels need image_mask, got image_mask=None"):
        model.masked_loss(image, image_labels=labels)
    with pytest.raises(ValueError, match="text_labels need tokens, got tokens=None"):
        model.masked_loss(image, text_labels=tokens)
    with pytest.raises(ValueError, match=r"image_mask, \(3, 16\), got \(3, 15\)"):
        model.masked_loss(image, image_mask=mask, image_labels=labels[:, 1:])
    with pytest.raises(ValueError, match=r"shape of tokens, \(3, 9\), got \(3, 8\)"):
        model.masked_loss(tokens=tokens, text_labels=tokens[:, 1:])
    with pytest.raises(ValueError, match=r"1 \+ 16 tokens, got 9 tokens"):
        model.masked_image_logits(model.forward_features(tokens=tokens), mask)


# --- Retrieval ---


def test_embeddings_have_length_one_and_come_from_the_first_token():
    model = make(**ALL_HEADS)
    image, tokens, _ = draw()
    padding = torch.arange(TEXT_LEN).expand(3, -1) >= 6
    head = model.retrieval_head
    expected = head.vision_head.weight @ model.forward_features(image)[:, 0, :, None]
    expected = expected.squeeze(2) / expected.squeeze(2).norm(dim=1, keepdim=True)
    torch.testing.assert_close(model.encode_image(image), expected)
    features = model.forward_features(tokens=tokens, text_padding_mask=padding)
    expected = head.language_head.weight @ features[:, 0, :, None]
    expected = expected.squeeze(2) / expected.squeeze(2).norm(dim=1, keepdim=True)
    torch.testing.assert_close(model.encode_text(tokens, text_padding_mask=padding), expected)


def test_contrastive_loss_is_the_mean_over_both_directions():
    model = make(**ALL_HEADS)
    image, tokens, _ = draw()
    padding = torch.arange(TEXT_LEN).expand(3, -1) >= 6
    assert model.retrieval_head.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        model.retrieval_head.logit_scale.fill_(math.log(3.0))
    similar = (
        3.0 * model.encode_image(image) @ model.encode_text(tokens, text_padding_mask=padding).T
    )
    expected = sum(similar.logsumexp(dim) - similar.diagonal() for dim in (0, 1)).mean() / 2
    loss = model.contrastive_loss(image, tokens, text_padding_mask=padding)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda model, image, tokens: model.encode_image(image), "retrieval"),
        (lambda model, image, tokens: model.encode_text(tokens), "retrieval"),
        (lambda model, image, tokens: model.contrastive_loss(image, tokens), "retrieval"),
        (lambda m, image, tokens: m.masked_loss(tokens=tokens, text_labels=tokens), "masked_text"),
        (lambda m, image, tokens: m.masked_image_logits(image, image), "masked_image"),
        (lambda m, image, tokens: m.masked_text_logits(image, image), "masked_text"),
    ],
)
def test_missing_heads_are_named(call, name):
    image, tokens, _ = draw()
    with pytest.raises(ValueError, match=rf"'{name}', got a model with heads=\(\).*\('{name}',\)"):
        call(make(), image, tokens)


def test_the_first_token_of_a_text_is_real_where_it_is_pooled():
    model, (image, tokens, _) = make(**ALL_HEADS), draw()
    left = torch.zeros(3, TEXT_LEN, dtype=torch.bool)
    left[1:, :2] = True
    for call in (model.encode_text, lambda x, **y: model(None, x, **y)):
        with pytest.raises(ValueError, match=r"got True for texts \[1, 2\]. Pad on the right"):
            call(tokens, text_padding_mask=left)
    assert model(image, tokens, text_padding_mask=left).isfinite().all()
    with pytest.raises(ValueError, match="got 3 images and 2 texts"):
        model.contrastive_loss(image, tokens[:2])


def test_masks_that_do_not_fit_are_refused():
    model, (image, tokens, mask) = make(**ALL_HEADS), draw()
    features, text = model.forward_features(image, tokens), tokens > 0
    for call, good in ((model.masked_image_logits, mask), (model.masked_text_logits, text)):
        with pytest.raises(TypeError, match=r"mask must be bool, got torch\.int64"):
            call(features, good.long())
        with pytest.raises(ValueError, match=r"mask must be \(3, .* got \(2, "):
            call(features, good[:2])
    with pytest.raises(ValueError, match=r"text_len=9 tokens, .* got 17 tokens"):
        model.masked_text_logits(model.forward_features(image), text)


def test_padding_has_no_masked_loss():
    model, tokens = make(**ALL_HEADS), draw()[1]
    padding = torch.arange(TEXT_LEN).expand(3, -1) >= 6
    loss, expected = (
        model.masked_loss(tokens=tokens, text_labels=labels, text_padding_mask=padding)
        for labels in (tokens, tokens.masked_fill(padding, -100))
    )
    assert torch.equal(loss, expected)


def test_heads_may_be_a_list():
    assert make(heads=["retrieval"]).config.heads == ("retrieval",)
