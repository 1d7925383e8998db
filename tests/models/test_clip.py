"""The image-text model: towers, pooling, scale, loss, sizes and saving."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import timm.data
import torch
from torch.nn import functional

from longnet_zoo.factory import create_model, list_models, model_info
from longnet_zoo.layers import MemorySaving
from longnet_zoo.models import LongNetCLIP, LongNetMLMConfig
from longnet_zoo.ops.contrastive import contrastive_loss

from .small_clip import MAX_TEXT_LEN, OUTPUT_DIM, PAD_ID, SMALL, draw, make

FLOAT32 = {"atol": 1e-5, "rtol": 1e-5}


def test_catalogue_has_long_texts():
    assert list_models(modality="image-text") == ["longnet_clip_base", "longnet_clip_tiny"]
    for name in list_models(family="longnet_clip"):
        info = model_info(name)
        assert info.seq_len == info.config.max_text_len == 8192
        assert info.pattern.segment_lengths[-1] == 8192


def test_tiny_is_for_laptops_and_base_for_large_images():
    tiny, base = model_info("longnet_clip_tiny"), model_info("longnet_clip_base")
    assert 1_000_000 < tiny.num_params < 3_000_000
    assert 100_000_000 < base.num_params < 200_000_000
    assert base.config.image.usual_seq_len == 4096


def test_flops_are_those_of_an_image_and_a_text():
    model = make()
    towers = model.visual.flops(35) + model.text.flops(17)
    assert model.flops(17) == towers + 2 * OUTPUT_DIM * (24 + 16)


def test_features_are_projected_means_of_tokens():
    model, (image, tokens) = make(), draw()
    of_image = model.image_projection(model.visual.forward_features(image).mean(dim=1))
    torch.testing.assert_close(model.encode_image(image), of_image)
    for row, features in zip(tokens, model.encode_text(tokens), strict=True):
        states = model.text.forward_features(row[row != PAD_ID][None])
        torch.testing.assert_close(
            features, model.text_projection(states.mean(dim=1))[0], **FLOAT32
        )


def test_texts_of_one_length_are_attended_together():
    model, lengths, seen = make(), torch.tensor([3, 5, 2, 5, 3, 5, 2]), []
    tokens = torch.randint(0, 250, (7, 5)).masked_fill(torch.arange(5) >= lengths[:, None], PAD_ID)
    model.text.stack.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["key_padding_mask"]), with_kwargs=True
    )
    features = model.encode_text(tokens)
    (mask,) = seen
    assert (~mask).sum(dim=1).tolist() == [5, 5, 5, 3, 3, 2, 2]
    for row, length, found in zip(tokens, lengths, features, strict=True):
        torch.testing.assert_close(found, model.encode_text(row[None, :length])[0], **FLOAT32)


def test_towers_end_in_a_norm():
    model, (image, tokens) = make(), draw()
    for states in (model.visual.forward_features(image), model.text.forward_features(tokens)):
        torch.testing.assert_close(states.mean(dim=-1), torch.zeros(states.shape[:2]), **FLOAT32)


@pytest.mark.parametrize("extra", [1, 9])
def test_padding_does_not_change_a_text(extra):
    model, (_, tokens) = make(), draw()
    expected = model.encode_text(tokens)
    padded = functional.pad(tokens, (0, extra), value=PAD_ID)
    torch.testing.assert_close(model.encode_text(padded), expected, **FLOAT32)
    with torch.no_grad():
        model.text.embedding.weight[PAD_ID] = 100.0
    torch.testing.assert_close(model.encode_text(padded), expected, **FLOAT32)
    (grad,) = torch.autograd.grad(model.encode_text(padded).sum(), model.text.embedding.weight)
    assert (grad[PAD_ID] == 0).all()


def test_pad_id_can_be_another():
    model, (_, tokens) = make(pad_id=7), draw()
    longer = functional.pad(tokens, (0, 3), value=7)
    torch.testing.assert_close(model.encode_text(longer), model.encode_text(tokens), **FLOAT32)


def test_text_sees_both_ways():
    model = make()
    tokens = torch.randint(256, (1, 20))
    states = model.text.forward_features(tokens)
    for place in (0, 19):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % 256
        moved = (model.text.forward_features(changed) != states).any(dim=-1)[0]
        assert moved.sum() > 1
        assert moved[place]


def test_call_gives_what_logits_are_made_of():
    model, pairs = make(), draw()
    image_features, text_features, scale = model(*pairs)
    for features, raw in (
        (image_features, model.encode_image(pairs[0])),
        (text_features, model.encode_text(pairs[1])),
    ):
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(3))
        torch.testing.assert_close(features, raw / raw.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(model.encode_image(pairs[0], normalize=True), image_features)
    torch.testing.assert_close(model.encode_text(pairs[1], normalize=True), text_features)
    assert scale.item() == pytest.approx(1 / 0.07)


def test_call_takes_one_side_alone():
    model, (image, tokens) = make(), draw()
    features, nothing, _ = model(image)
    assert nothing is None
    assert torch.equal(features, model.encode_image(image, normalize=True))
    nothing, features, _ = model(tokens=tokens)
    assert nothing is None
    assert torch.equal(features, model.encode_text(tokens, normalize=True))


def test_sigmoid_has_a_bias_and_its_own_start():
    model, pairs = make(loss="sigmoid"), draw()
    *_, scale, bias = model(*pairs)
    assert scale.item() == pytest.approx(10)
    assert bias.item() == -10
    assert make().logit_bias is None
    assert model.contrastive_loss(*pairs).item() == pytest.approx(
        contrastive_loss(*model(*pairs)[:2], 10.0, bias=-10.0, kind="sigmoid").item(), rel=1e-5
    )


def test_loss_is_that_of_the_features():
    model, pairs = make(), draw()
    labels = torch.tensor([4, 4, 9])
    image, text, scale = model(*pairs)
    for options in ({}, {"labels": labels}, {"labels": labels, "chunk_size": 2}):
        expected = contrastive_loss(image, text, scale, labels=options.get("labels"))
        torch.testing.assert_close(model.contrastive_loss(*pairs, **options), expected)
    calls = []
    model.contrastive_loss_op = lambda *args, **kwargs: calls.append(kwargs)
    model.contrastive_loss(*pairs, labels=labels, chunk_size=2)
    assert calls == [{"bias": None, "kind": "softmax", "labels": labels, "chunk_size": 2}]


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_every_parameter_gets_a_gradient_and_training_lowers_the_loss(loss):
    model, pairs = make(loss=loss), draw()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        value = model.contrastive_loss(*pairs)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    lacking = [name for name, x in model.named_parameters() if x.grad is None or not x.grad.any()]
    assert lacking == []
    assert losses[-1] < 0.3 * losses[0]


def test_scale_stays_below_100_by_itself_and_comes_back():
    model, pairs = make(), draw()
    with torch.no_grad():
        model.logit_scale.fill_(7.0)
    model.eval()
    assert model(*pairs)[2].item() == pytest.approx(100)
    assert model.logit_scale == 7  # evaluation changes nothing
    model.train()
    scale = model(*pairs)[2]
    assert scale.item() == pytest.approx(100)
    assert model.logit_scale.item() == pytest.approx(math.log(100))
    # At the bound the gradient is still there, so that training can lower it again.
    (grad,) = torch.autograd.grad(scale, model.logit_scale)
    assert grad.item() == pytest.approx(100)


def test_two_losses_can_be_added_before_the_backward_pass():
    model, pairs = make(), draw()
    with torch.no_grad():
        model.logit_scale.fill_(7.0)
    (model.contrastive_loss(*pairs) + model.contrastive_loss(*pairs)).backward()
    assert model.logit_scale.grad.isfinite()


def test_no_weight_decay_names_what_is_no_matrix():
    model = make(loss="sigmoid", text={**SMALL["text"], "position": "relative"})
    names, known = model.no_weight_decay(), dict(model.named_parameters())
    assert names <= known.keys()
    assert {"logit_scale", "logit_bias", "visual.pos_embed", "visual.norm.weight"} <= names
    assert "text.stack.position_bias.embedding.weight" in names
    assert all(x in names or x.endswith("weight") for x in known)


@pytest.mark.parametrize("how", ["checkpointing", "memory"])
def test_saving_memory_reaches_both_towers_and_changes_no_gradient(how):
    model, pairs = make(), draw()
    expected = torch.autograd.grad(model.contrastive_loss(*pairs), tuple(model.parameters()))
    if how == "checkpointing":
        model.set_grad_checkpointing()
    else:
        model.set_memory_saving(MemorySaving(chunk_size=11, keep_attention=True))
    for tower in (model.visual, model.text):
        assert all(block.memory_saving is not None for block in tower.stack.blocks)
    found = torch.autograd.grad(model.contrastive_loss(*pairs), tuple(model.parameters()))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("is_autocast", [False, True])
def test_half_precision(is_autocast):
    model, (image, tokens) = make(), draw()
    expected = model.contrastive_loss(image, tokens)
    if not is_autocast:
        model, image = model.bfloat16(), image.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        loss = model.contrastive_loss(image, tokens)
        features = model.encode_text(tokens, normalize=True)
    assert loss.dtype == torch.float32
    assert features.dtype == torch.bfloat16
    assert loss.item() == pytest.approx(expected.item(), rel=0.1)
    # Of length 1 in float32: a cosine in bfloat16, times 100, would be off by up to 0.4.
    lengths = []
    model.contrastive_loss_op = lambda *features, **_: lengths.extend(
        x.norm(dim=-1) for x in features[:2]
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        model.contrastive_loss(image, tokens)
    torch.testing.assert_close(torch.stack(lengths), torch.ones(2, 3))


def test_data_config_is_read_from_the_image_tower():
    data = timm.data.resolve_data_config(model=make().visual)
    assert data["input_size"] == (3, 28, 20)
    assert data["interpolation"] == "bicubic"


def test_image_size_can_be_changed(tmp_path):
    model = make()
    model.set_input_size((32, 24), patch_size=8)
    assert model.config.image.img_size == (32, 24)
    assert timm.data.resolve_data_config(model=model.visual)["input_size"] == (3, 32, 24)
    image = torch.randn(1, 3, 32, 24)
    model.save_pretrained(tmp_path)
    loaded = LongNetCLIP.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode_image(image), model.eval().encode_image(image))


def test_saved_model_comes_back(tmp_path):
    model, pairs = make(loss="sigmoid").eval(), draw()
    model.save_pretrained(tmp_path)
    for loaded in (
        LongNetCLIP.from_pretrained(tmp_path),
        make(pretrained=tmp_path).eval(),
        copy.deepcopy(model),
    ):
        assert loaded.config == model.config
        for ours, theirs in zip(loaded(*pairs), model(*pairs), strict=True):
            assert torch.equal(ours, theirs)
    assert LongNetCLIP.from_pretrained(tmp_path, max_text_len=99).config.max_text_len == 99


def test_options_of_a_tower_change_that_tower_alone():
    base = model_info("longnet_clip_tiny").config
    model = create_model("longnet_clip_tiny", image={"num_layers": 1}, text={"num_layers": 1})
    assert model.config == replace(
        base, image=replace(base.image, num_layers=1), text=replace(base.text, num_layers=1)
    )


def test_mistyped_options_of_a_tower_are_named_when_weights_are_loaded(tmp_path):
    make().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"LongViTConfig has no options 'img_sz'\. Options: embed_"):
        LongNetCLIP.from_pretrained(tmp_path, image={"img_sz": 28})


def test_too_long_texts_are_refused():
    model = make()
    model.encode_text(torch.zeros(1, MAX_TEXT_LEN, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"at most max_text_len=40 tokens, got 41\. Cut them"):
        model.encode_text(torch.zeros(1, MAX_TEXT_LEN + 1, dtype=torch.int64))


def test_bad_input_is_refused():
    model, (image, tokens) = make(), draw()
    with pytest.raises(ValueError, match=r"in_chans=3, got \(3, 1, 28, 20\)"):
        model.encode_image(image[:, :1])
    with pytest.raises(ValueError, match=r"vocab_size=259, got values from .* to 259"):
        model.encode_text(tokens + 1)
    with pytest.raises(TypeError, match=r"tokens must be int64 or int32, got torch.float32"):
        model.encode_text(tokens.float())
    with pytest.raises(ValueError, match=r"at the right, got pad_id=258 first in rows \[1, 2\]"):
        model.encode_text(tokens.flip(1))
    with pytest.raises(ValueError, match=r"got \(3, 10\) and \(2, 10\)"):
        model.contrastive_loss(image, tokens[:2])


def test_bad_options_are_refused():
    create = partial(create_model, "longnet_clip_tiny")
    for options in ({"num_classes": 5}, {"global_pool": ""}):
        with pytest.raises(ValueError, match=r"image must be a tower without a head.*got num_cl"):
            create(image=options)
    with pytest.raises(ValueError, match=r"without a head, num_outputs=0, got .* num_outputs=7"):
        create(text={"num_outputs": 7, "tie_embeddings": False})
    with pytest.raises(ValueError, match=r"with a token embedding .* got vocab_size=None"):
        create(text={"vocab_size": None})
    with pytest.raises(ValueError, match=r"got pad_id=258 and vocab_size=258"):
        create(text={"vocab_size": 258})
    with pytest.raises(ValueError, match=r"pad_id must be an integer of at least 0, got -1"):
        create(pad_id=-1)
    with pytest.raises(ValueError, match=r"loss must be one of 'softmax', 'sigmoid', got 'hinge'"):
        create(loss="hinge")
    for name in ("output_dim", "max_text_len"):
        with pytest.raises(ValueError, match=rf"{name} must be an integer of at least 1, got 0"):
            create(**{name: 0})
    with pytest.raises(TypeError, match=r"image must be a LongViTConfig, got LongNetMLMConfig"):
        create(image=LongNetMLMConfig())
