"""BEiT-3: images, texts and pairs, with the dense pattern and with a dilated one."""

import math
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from timm.optim import param_groups_layer_decay

from longnet_zoo.factory import create_model, list_models, model_info
from longnet_zoo.models import BEiT3
from longnet_zoo.registry import find_model
from tests.models.beit3_draws import (
    ALL_HEADS,
    DILATED,
    NUM_IMAGE,
    TEXT_LEN,
    all_inputs,
    draw,
    draw_training,
    make,
    make_config,
    total_loss,
)

PATTERNS = pytest.mark.parametrize("pattern", [{}, DILATED], ids=["dense", "dilated"])


# --- The catalogue ---


def test_sizes_have_the_published_number_of_parameters():
    """Whole models: computed with torchscale; heads: counts of unilm's README, in millions."""
    with torch.device("meta"):
        for size, params, counts in (
            ("base", 220_987_392, {"in1k": 87, "vqa": 228, "coco_retrieval": 222}),
            ("large", 672_702_464, {"in1k": 305, "vqa": 683, "coco_retrieval": 675}),
        ):
            entry = find_model(f"longnet_beit3_{size}_patch16_224")
            assert entry.build(entry.config).num_params() == params
            masked = replace(entry.config, heads=("masked_image", "masked_text"))
            assert entry.build(masked).num_params() // 10**6 == {"base": 276, "large": 746}[size]
            options = {weights.tag: weights.options for weights in entry.weights}
            for tag, count in counts.items():
                model = entry.build(replace(entry.config, **options[tag]))
                assert round(model.num_params() / 10**6) == count


def test_catalogue():
    names = list_models("longnet_beit3_*", modality="vision-language")
    assert names == [
        "longnet_beit3_base_patch16_224",
        "longnet_beit3_large_patch16_224",
        "longnet_beit3_tiny",
    ]
    model = create_model("longnet_beit3_tiny", num_classes=3)
    assert model.num_params() < 2_000_000
    assert model(torch.randn(1, 3, 64, 64), torch.randint(259, (1, 254))).shape == (1, 3)
    entry = find_model("longnet_beit3_base_patch16_224")
    assert {weights.licence for weights in entry.weights} == {"MIT"}
    locations = [weights.location for weights in entry.weights]
    assert len(set(locations)) == len(locations) == 7
    assert all("/beit3_base_" in location for location in locations)
    assert not find_model("longnet_beit3_tiny").weights
    assert model_info("longnet_beit3_base_patch16_224")


def test_flops_count_one_modality_per_token():
    plain, multiway = make(vocab_size=None), make()
    assert plain.flops(17) == multiway.flops(17) > 0
    assert make_config().usual_seq_len == 17


# --- Outputs ---


@PATTERNS
def test_output_has_image_tokens_then_text_tokens(pattern):
    model = make(**pattern)
    lengths = [model.forward_features(**inputs).shape[1] for inputs in all_inputs()]
    assert lengths == [17, 17, 9, 9, 26, 26]
    assert model.num_features == model.embed_dim == 24
    assert model.num_classes == 0
    for inputs in all_inputs():
        assert torch.equal(model(**inputs), model.forward_features(**inputs)[:, 0])


def test_weights_of_the_other_modality_are_not_used():
    image, tokens, _ = draw()
    model = make()
    image_out, text_out = model.forward_features(image), model.forward_features(tokens=tokens)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts.1." in name or name.startswith("text_embed"):
                parameter.fill_(float("nan"))
    assert torch.equal(model.forward_features(image), image_out)
    assert model.forward_features(tokens=tokens).isnan().all()
    other = make()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "experts.0." in name or name.startswith("image_embed"):
                parameter.fill_(float("nan"))
    assert other.forward_features(tokens=tokens).isfinite().all()
    assert text_out.isfinite().all()


def test_a_model_of_images_alone_equals_the_image_part_of_the_whole():
    model, alone = make(), make(vocab_size=None)
    weights = {
        key.replace(".experts.0.", "."): x
        for key, x in model.state_dict().items()
        if not key.startswith("text_embed") and ".experts.1." not in key
    }
    alone.load_state_dict(weights)
    image, tokens, mask = draw()
    expected = model.forward_features(image, image_mask=mask)
    assert torch.equal(alone.forward_features(image, image_mask=mask), expected)
    with pytest.raises(ValueError, match="this one has vocab_size=None"):
        alone(image, tokens)


@PATTERNS
def test_calls_do_not_change_later_calls(pattern):
    model, inputs = make(**pattern), all_inputs()
    first = [model.forward_features(**x) for x in inputs]
    again = [model.forward_features(**x) for x in reversed(inputs)]
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(again), strict=True))


@PATTERNS
def test_padded_batch_equals_one_by_one(pattern):
    model = make(**pattern)
    image, tokens, _ = draw()
    lengths = (9, 4, 1)
    padding = torch.arange(TEXT_LEN) >= torch.tensor(lengths)[:, None]
    assert_close = partial(torch.testing.assert_close, atol=2e-6, rtol=1e-6)
    texts = model.forward_features(tokens=tokens, text_padding_mask=padding)
    pairs = model.forward_features(image, tokens, text_padding_mask=padding)
    assert pairs.isfinite().all()
    for i, length in enumerate(lengths):
        row, text = slice(i, i + 1), tokens[i : i + 1, :length]
        assert_close(texts[row, :length], model.forward_features(tokens=text))
        alone = model.forward_features(image[row], text)
        assert_close(pairs[row, : NUM_IMAGE + length], alone)


def test_content_of_padding_changes_nothing():
    model = make()
    image, tokens, _ = draw()
    padding = torch.arange(TEXT_LEN).expand(3, -1) >= 5
    out = model.forward_features(image, tokens, text_padding_mask=padding)
    other = tokens.masked_fill(padding, 7)
    assert torch.equal(model.forward_features(image, other, text_padding_mask=padding), out)


def test_masked_patches_are_hidden():
    model = make()
    image, tokens, mask = draw()
    out = model.forward_features(image, tokens, image_mask=mask)
    pixels = mask.unflatten(1, (4, 4)).repeat_interleave(5, 1).repeat_interleave(5, 2)
    hidden = image.masked_fill(pixels[:, None], 3.0)
    assert torch.equal(model.forward_features(hidden, tokens, image_mask=mask), out)
    assert (model.forward_features(hidden, tokens) - out).abs().max() > 1e-3
    # Neither none nor all of them: what is seen does count.
    seen = image.masked_fill(~pixels[:, None], 3.0)
    assert (model.forward_features(seen, tokens, image_mask=mask) - out).abs().max() > 1e-3


def test_positions_of_texts_begin_anew_behind_an_image():
    model = make()
    tokens = draw()[1]
    embedded = model.text_embed(tokens, None)
    rows = model.text_embed.positions.weight[2:11]
    torch.testing.assert_close(embedded, model.text_embed.tokens(tokens) + rows)
    with torch.no_grad():  # of the longest text the last row is used, of others not
        model.text_embed.positions.weight[-1] = float("nan")
    assert model.forward_features(tokens=tokens).isfinite().all()
    longest = torch.zeros(1, 13, dtype=torch.long)
    assert model.forward_features(tokens=longest).isnan().any()


def test_dilated_pattern_takes_the_same_weights_to_long_inputs():
    dense = make(max_text_len=300, img_size=80)
    long = make(max_text_len=300, img_size=80, **DILATED)
    long.load_state_dict(dense.state_dict())
    image, tokens = torch.randn(1, 3, 80, 80), torch.randint(61, (1, 300))
    out = long.forward_features(image, tokens)
    assert out.shape == (1, 557, 24)
    assert (out - dense.forward_features(image, tokens)).abs().max() > 1e-3
    # One segment that holds all tokens is dense attention.
    one = make(max_text_len=300, img_size=80, segment_lengths=(557,), dilation_rates=(1,))
    one.load_state_dict(dense.state_dict())
    expected = dense.forward_features(image, tokens)
    torch.testing.assert_close(one.forward_features(image, tokens), expected)


# --- Initial values and gradients ---


def test_gains_of_the_depth_survive_construction():
    model = make(embed_dim=96, num_layers=4, ffn_dim=128, num_classes=5)
    gain = math.sqrt(math.log(8))
    for name in ("v_proj", "out_proj", "fc1", "fc2"):
        weights = [
            x for key, x in model.stack.named_parameters() if f".{name}." in key and x.ndim == 2
        ]
        assert len(weights) == 8
        for weight in weights:
            expected = gain * math.sqrt(2 / sum(weight.shape))
            assert weight.std().item() == pytest.approx(expected, rel=0.05)


@PATTERNS
@pytest.mark.parametrize("global_pool", ["token", "avg"])
def test_every_parameter_gets_a_gradient(pattern, global_pool):
    model = make(**ALL_HEADS, global_pool=global_pool, **pattern)
    total_loss(model, *draw_training()).backward()
    without = [
        key for key, x in model.named_parameters() if x.grad is None or not x.grad.abs().sum() > 0
    ]
    assert not without


def test_checkpointing_does_not_change_gradients():
    model, inputs = make(**ALL_HEADS, dropout=0.2, drop_path=0.2), draw_training()
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(1)
        total_loss(model, *inputs).backward()
        grads.append([x.grad.clone() for x in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1], atol=0, rtol=0)


def test_embeddings_are_dropped_in_training_alone():
    model, image = make(dropout=0.5), draw()[0]
    embedded = []
    model.stack.register_forward_pre_hook(lambda _, inputs: embedded.append(inputs[0]))
    model(image)
    model.eval()
    model(image)
    shares = [(x == 0.0).float().mean().item() for x in embedded]
    assert shares == [pytest.approx(0.5, abs=0.1), 0.0]


# --- Compilation, export, half types ---


def test_compiled_model_equals_eager_in_one_graph():
    model = make(**ALL_HEADS, **DILATED, num_layers=1)
    inputs = draw_training()
    expected = total_loss(model, *inputs)
    expected.backward()
    grads = [x.grad.clone() for x in model.parameters()]
    model.zero_grad()
    compiled = torch.compile(partial(total_loss, model), fullgraph=True, backend="aot_eager")
    loss = compiled(*inputs)
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grads, [x.grad for x in model.parameters()], atol=1e-5, rtol=1e-4)


def test_compiled_features_with_padding_equal_eager():
    model, inputs = make(num_layers=1), all_inputs()[-1]
    compiled = torch.compile(model.forward_features, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs), model.forward_features(**inputs))


@PATTERNS
def test_exported_program_takes_other_batches_and_texts(pattern):
    model = make(num_classes=5, num_layers=1, **pattern).eval()
    inputs = all_inputs()[-1]
    batch, text_len = torch.export.Dim("batch", max=64), torch.export.Dim("text_len", max=13)
    of_text, of_image = {0: batch, 1: text_len}, {0: batch}
    shapes = {"image": of_image, "image_mask": of_image}
    shapes |= {"tokens": of_text, "text_padding_mask": of_text}
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes).module()
    torch.testing.assert_close(program(**inputs), model(**inputs))
    others = {
        name: x[:2, :6] if name in ("tokens", "text_padding_mask") else x[:2]
        for name, x in inputs.items()
    }
    torch.testing.assert_close(program(**others), model(**others))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_finite_and_close(dtype):
    model, inputs = make(**ALL_HEADS), draw_training()
    expected = total_loss(model, *inputs)
    with torch.autocast("cpu", dtype=dtype):
        loss = total_loss(model, *inputs)
    loss.backward()
    assert 0 < (loss - expected).abs() < 0.03 * expected.abs() + 0.1
    assert all(x.grad.isfinite().all() for x in model.parameters())


def test_bfloat16_weights():
    model, inputs = make(**ALL_HEADS), all_inputs()[-1]
    expected = model.forward_features(**inputs)
    model.to(torch.bfloat16)
    inputs["image"] = inputs["image"].to(torch.bfloat16)
    out = model.forward_features(**inputs)
    assert out.dtype == torch.bfloat16
    assert 0 < (out.float() - expected).norm() / expected.norm() < 0.03


# --- Saving, groups ---


def test_save_and_load(tmp_path):
    model = make(**ALL_HEADS, global_pool="avg", final_norm=False, **DILATED).eval()
    model.save_pretrained(tmp_path)
    loaded = BEiT3.from_pretrained(tmp_path)
    assert loaded.config == model.config
    inputs = all_inputs()[-1]
    assert torch.equal(loaded(**inputs), model(**inputs))


def test_no_weight_decay_names_norms_biases_and_positions():
    model = make(**ALL_HEADS)
    names = model.no_weight_decay()
    assert names <= dict(model.named_parameters()).keys()
    decayed = {name for name, _ in model.named_parameters()} - names
    in_blocks = {name.removeprefix("stack.") for name in decayed if name.startswith("stack")}
    kinds = {re.sub(r"^blocks\.\d\.|\.experts\.\d", "", name) for name in in_blocks}
    assert kinds == {
        *(f"attention.{name}_proj.weight" for name in ("q", "k", "v", "out")),
        "feed_forward.fc1.weight",
        "feed_forward.fc2.weight",
    }
    outside = {name for name in decayed if not name.startswith("stack")}
    assert outside == {
        "image_embed.proj.weight",
        "text_embed.tokens.weight",
        "masked_image_head.weight",
        "masked_text_head.weight",
        "retrieval_head.vision_head.weight",
        "retrieval_head.language_head.weight",
        "classifier.pooler.weight",
        "classifier.head.0.weight",
        "classifier.head.3.weight",
    }


def test_layer_decay_of_timm_goes_by_depth():
    model = make(num_classes=5)
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scales = {
        name: group["lr_scale"]
        for group in groups
        for name, parameter in model.named_parameters()
        if any(parameter is x for x in group["params"])
    }
    assert len(scales) == len(list(model.parameters()))
    assert scales["image_embed.cls_token"] == scales["text_embed.tokens.weight"] == 0.125
    assert scales["stack.blocks.0.attention.q_proj.experts.1.weight"] == 0.25
    assert scales["stack.blocks.1.attention.q_proj.experts.0.weight"] == 0.5
    assert scales["stack.norm.experts.0.weight"] == 0.5  # goes with the last block
    assert scales["classifier.head.0.weight"] == 1.0
    blocks = model.group_matcher(coarse=True)["blocks"][0][0]
    assert blocks == r"^stack\.blocks"
