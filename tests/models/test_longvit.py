"""LongViT: sizes, head, precision, saving; `test_timm_registry.py` has what timm asks of it."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from longnet_zoo.factory import list_models, model_info
from longnet_zoo.models import LongViT, LongViTConfig
from longnet_zoo.weights import load_state_dict
from tests.models.small_vision import CLASSES, EMBED_DIM, LAYERS, PATCH, SMALL, draw, make

NAMES = list_models(modality="vision")


def gradients(model, images):
    model.zero_grad()
    output = model(images)
    torch.manual_seed(7)
    (output * torch.randn_like(output)).sum().backward()
    return {key: x.grad.clone() for key, x in model.named_parameters()}


def test_catalogue_has_the_published_sizes():
    small = {f"longvit_small_patch32_{side}" for side in (1024, 4096, 8192, 16384, 32768)}
    assert {"longvit_tiny_patch8_64"} | small <= set(NAMES)


@pytest.mark.parametrize(
    ("side", "segment_lengths"),
    [
        (1024, (64, 128, 256, 512, 1024)),
        (4096, (1024, 2048, 4096, 8192, 16384)),
        (8192, (1024, 4096, 8192, 16384, 65536)),
        (16384, (1024, 4096, 16384, 65536, 262144)),
        (32768, (1024, 4096, 32768, 262144, 1048576)),
    ],
)
def test_published_sizes(side, segment_lengths):
    info = model_info(f"longvit_small_patch32_{side}")
    assert info.seq_len == (side // 32) ** 2
    assert info.pattern.segment_lengths == segment_lengths
    assert info.pattern.dilation_rates == (1, 2, 4, 8, 16)
    # Encoder 21,339,648, patches 1,180,032; at 1,024 px 22,912,896 in all.
    assert info.num_params == 21_339_648 + 1_180_032 + 384 * (side // 32) ** 2


def test_tiny_is_for_laptops():
    assert 1_000_000 < model_info("longvit_tiny_patch8_64").num_params < 2_000_000


def test_flops_count_patches_stack_and_head():
    config = LongViTConfig(**SMALL)
    patches, stack = 3 * PATCH**2 * EMBED_DIM, LAYERS * (4 * EMBED_DIM**2 + 2 * EMBED_DIM * 40)
    pairs = LAYERS * config.pattern.attended_pairs(35, 4, is_causal=False)
    assert config.usual_seq_len == 35
    expected = 2 * 35 * (patches + stack) + pairs * 4 * (EMBED_DIM // 4) + 2 * EMBED_DIM * CLASSES
    assert LongViT(config).flops(35) == expected


@pytest.mark.parametrize("depth", [2, 5])
def test_initial_gains_survive_construction(depth):
    model = make(num_layers=depth, embed_dim=64, ffn_dim=256)
    gain = math.sqrt(math.log(2 * depth))
    for name, weight in model.stack.named_parameters():
        role = name.split(".")[-2]
        if role in ("v_proj", "out_proj", "fc1", "fc2", "q_proj", "k_proj") and weight.ndim == 2:
            std = math.sqrt(2 / sum(weight.shape)) * (1 if role in ("q_proj", "k_proj") else gain)
            assert weight.std().item() == pytest.approx(std, rel=0.06), name
    for weight in (model.pos_embed, model.head.weight):
        assert weight.abs().max() <= 0.02


def test_head_is_the_norm_of_the_mean():
    model, images = make(), draw()
    features = model.forward_features(images)
    assert features.shape == (2, 35, EMBED_DIM)
    pooled = model.fc_norm(features.mean(dim=1))
    assert torch.equal(model.forward_head(features, pre_logits=True), pooled)
    assert torch.equal(model(images), model.head(pooled))


def test_model_without_a_head_has_no_norm_after_the_mean():
    model, images = make(num_classes=0), draw()
    assert not [key for key in model.state_dict() if key.startswith(("fc_norm", "head"))]
    assert torch.equal(model(images), model.forward_features(images).mean(dim=1))


def test_final_norm_is_that_of_dino():
    model, images = make(num_classes=0, final_norm=True), draw()
    assert model.norm.eps == 1e-6
    torch.nn.init.normal_(model.norm.weight)
    expected = model.norm(model.stack(model.embed(images)))
    assert torch.equal(model.forward_features(images), expected)
    last = model.get_intermediate_layers(images, 1, norm=True)[0]
    assert torch.equal(last, expected)
    assert torch.equal(model.forward_intermediates(images)[0], expected)
    raw = model.get_intermediate_layers(images, 1)[0]
    assert torch.equal(raw, model.stack(model.embed(images)))


def test_without_pooling_every_token_is_classified():
    model, images = make(global_pool=""), draw()
    logits = model(images)
    assert logits.shape == (2, 35, CLASSES)
    features = model.forward_features(images)
    assert torch.equal(logits, model.head(model.fc_norm(features)))


def test_dropouts_are_used():
    images = draw()
    for option in ("dropout", "attention_dropout", "activation_dropout", "drop_path"):
        model = make(**{option: 0.5})
        assert not torch.equal(model.forward_features(images), model.forward_features(images))
        model.eval()
        assert torch.equal(model(images), model(images))
    model = make(dropout=0.5)
    assert not torch.equal(model.embed(images), model.embed(images))
    model = make(head_dropout=0.5)
    features = model.forward_features(images)
    assert not torch.equal(model.forward_head(features), model.forward_head(features))


def test_padded_images_equal_the_images_one_by_one():
    model = make()
    images = [draw(batch=1, height=28, width=20), draw(batch=1, height=12, width=16), draw(1, 4, 4)]
    tokens = [model.embed(image)[0] for image in images]
    padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    mask = torch.arange(35) >= torch.tensor([len(x) for x in tokens])[:, None]
    features = model.forward_tokens(padded, key_padding_mask=mask)
    logits = model.forward_head(features, key_padding_mask=mask)
    alone = torch.cat([model(image) for image in images])
    # Equal but for the rounding of float32: 1e-5 where features are about 3 in size.
    torch.testing.assert_close(logits, alone, atol=1e-6, rtol=1e-5)
    for row, image in enumerate(images):
        expected = model.forward_features(image)[0]
        found = features[row, : len(expected)]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_embedded_pixels_train_the_whole_model():
    model = make()
    pixels = np.random.default_rng(0).integers(256, size=(28, 20, 3), dtype=np.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    scaled = torch.tensor(pixels).permute(2, 0, 1) / 255
    image = ((scaled - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])[None]
    expected = gradients(model, image)
    model.zero_grad()
    tokens = model.embed_pixels(pixels, mean=mean, std=std, strip_patches=2)
    torch.testing.assert_close(tokens, model.embed(image), atol=1e-6, rtol=1e-6)
    logits = model.forward_head(model.forward_tokens(tokens))
    torch.manual_seed(7)
    (logits * torch.randn_like(logits)).sum().backward()
    found = {key: x.grad for key, x in model.named_parameters()}
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_exported_model_equals_eager():
    model, images = make().eval(), draw()
    program = torch.export.export(model, (images,))
    torch.testing.assert_close(program.module()(images), model(images), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_finite_and_close_to_float32(dtype):
    model, images = make(), 10 * draw()
    logits = model(images)
    with torch.autocast("cpu", dtype=dtype):
        half = model(images)
    half.float().sum().backward()
    assert half.dtype == dtype
    error = (half.float() - logits).norm() / logits.norm()
    assert 0 < error < 8 * torch.finfo(dtype).eps
    assert all(x.grad.isfinite().all() for x in model.parameters())


def test_bfloat16_model_takes_other_image_sizes():
    model = make().to(torch.bfloat16)
    images = draw(height=36).to(torch.bfloat16)
    half = model(images)
    assert half.dtype == torch.bfloat16
    logits = model.float()(images.float())
    assert 0 < (half.float() - logits).norm() / logits.norm() < 0.05


def test_checkpointing_does_not_change_gradients():
    model, images = make(), draw()
    expected = gradients(model, images)
    model.set_grad_checkpointing()
    torch.testing.assert_close(gradients(model, images), expected, atol=0, rtol=0)
    found = model.forward_intermediates(images, intermediates_only=True)[-1]
    assert torch.equal(found.flatten(2).mT, model.stack(model.embed(images)))


@pytest.mark.parametrize("options", [{}, {"global_pool": ""}, {"final_norm": True}])
def test_save_and_load_round_trip(options, tmp_path):
    model, images = make(**options).eval(), draw()
    model.save_pretrained(tmp_path)
    again = LongViT.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(images), model(images))


def test_changed_model_round_trip(tmp_path):
    model = make().eval()
    model.set_input_size(img_size=36, patch_size=6)
    model.prune_intermediate_layers([0, 1], prune_head=False)
    model.reset_classifier(2)
    model.save_pretrained(tmp_path)
    again = LongViT.from_pretrained(tmp_path)
    images = draw(height=36, width=36)
    assert again(images).shape == (2, 2)
    assert torch.equal(again(images), model(images))


def test_reset_classifier_keeps_the_features_and_describes_the_new_model():
    model, images = make(), draw()
    features = model.forward_features(images)
    norm = model.fc_norm
    model.reset_classifier(7)
    assert model.fc_norm is norm  # as timm does
    assert model(images).shape == (2, 7)
    assert torch.equal(model.forward_features(images), features)
    again = LongViT(model.config)
    load_state_dict(again, model.state_dict())
    assert torch.equal(again(images), model(images))
    model.double().reset_classifier(0)
    model.reset_classifier(3)
    assert model.head.weight.dtype == model.fc_norm.weight.dtype == torch.float64


def test_pruned_model_gives_the_same_intermediates():
    model, images = make(), draw()
    expected = model.forward_intermediates(images, [0, -2], intermediates_only=True)
    assert model.prune_intermediate_layers([0, -2], prune_norm=True) == [0, 1]
    assert len(model.stack.blocks) == model.config.num_layers == 2
    found = model.forward_intermediates(images, [0, 1], intermediates_only=True)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert model(images).shape == (2, 35, EMBED_DIM)


def test_pruning_can_remove_the_norm_or_keep_the_head():
    model = make(final_norm=True)
    model.prune_intermediate_layers(1, prune_norm=True, prune_head=False)
    assert isinstance(model.norm, torch.nn.Identity)
    assert not model.config.final_norm
    assert model(draw()).shape == (2, CLASSES)
    model = make(final_norm=True)
    model.prune_intermediate_layers(1)
    assert model.config.final_norm


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"img_size": 30}, ValueError, "whole patches of patch_size=4, got 30"),
        ({"img_size": (28, 22)}, ValueError, r"patch_size=4, got \(28, 22\)"),
        ({"img_size": 0}, ValueError, "got 0"),
        ({"img_size": (28, 20, 3)}, TypeError, r"img_size .* got \(28, 20, 3\)"),
        ({"img_size": 28.0}, TypeError, "img_size .* got 28.0"),
        ({"patch_size": 0}, ValueError, "patch_size .* got 0"),
        ({"in_chans": 0}, ValueError, "in_chans .* got 0"),
        ({"num_classes": -1}, ValueError, "num_classes .* got -1"),
        ({"global_pool": "token"}, ValueError, "global_pool must be one of 'avg', '', got 'token'"),
        ({"final_norm": 1}, TypeError, "final_norm must be True or False, got 1"),
        ({"head_dropout": 1.0}, ValueError, "head_dropout .* got 1.0"),
    ],
)
def test_bad_options_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        replace(LongViTConfig(**SMALL), **options)


@pytest.mark.parametrize("content", [torch.nan, torch.inf, 1e30])
def test_content_of_padding_changes_neither_result_nor_gradients(content):
    model, mask = make(), torch.arange(35) >= torch.tensor([[35], [9]])
    tokens = model.embed(draw()).detach()
    results = []
    for value in (0.0, content):
        model.zero_grad()
        filled = tokens.masked_fill(mask[..., None], value)
        features = model.forward_tokens(filled, key_padding_mask=mask)
        out = model.forward_head(features, key_padding_mask=mask)
        out.sum().backward()
        results.append([out, *(x.grad for x in model.stack.parameters())])
    torch.testing.assert_close(*results, atol=0, rtol=0)
    with pytest.raises(ValueError, match=r"key_padding_mask must be \(2, 35\), got \(1, 35\)"):
        model.forward_tokens(tokens, key_padding_mask=mask[:1])


def test_changed_models_keep_mode_frozen_patches_and_description():
    model = make().eval()
    model.patch_embed.requires_grad_(False)
    model.set_input_size(img_size=36, patch_size=6)
    model.reset_classifier(2)
    assert not model.head.training
    assert not any(x.requires_grad for x in model.patch_embed.parameters())
    assert model.pretrained_cfg["num_classes"] == model.default_cfg["num_classes"] == 2
    assert model.pretrained_cfg["input_size"] == (3, 36, 36)


def test_images_of_another_floating_dtype_are_converted():
    model, images = make(), draw().half()
    assert torch.equal(model(images), model(images.float()))
