import dataclasses
import math
import re

import pytest
import torch
from timm.optim import param_groups_layer_decay

from longnet_zoo.factory import model_info
from longnet_zoo.models import GigaPathSlideConfig, GigaPathSlideEncoder
from longnet_zoo.registry import find_model
from tests.models.slides import (
    EMBED_DIM,
    INPUT_DIM,
    NUM_TILES,
    PUBLISHED,
    SMALL,
    draw_slides,
    make_encoder,
)

BOTH_POOLS = pytest.mark.parametrize("pool", ["cls", "mean"])
BOTH_RULES = pytest.mark.parametrize("rules", [{}, PUBLISHED], ids=["paper", "published"])


def padded_slides(lengths=(NUM_TILES, 17, 1)):
    """A padded batch; padding holds NaN, and coordinates that no slide may have."""
    tiles, coords = draw_slides(len(lengths))
    mask = torch.arange(NUM_TILES) >= torch.tensor(lengths)[:, None]
    tiles[mask] = torch.nan
    return tiles, coords.masked_fill(mask[..., None], -7), mask


def assert_close(ours, expected, atol=1e-6):
    torch.testing.assert_close(ours, expected, atol=atol, rtol=1e-5)


def test_flops_count_tiles_blocks_and_head():
    model = make_encoder(num_classes=3)
    d, f = EMBED_DIM, 40
    products = 2 * 50 * INPUT_DIM * d + 2 * 51 * 2 * (4 * d * d + 2 * d * f) + 2 * d * 3
    attention, _ = model.config.pattern.flops(51, 4, 6)
    assert model.flops(50) == products + 2 * attention
    assert model_info("gigapath_slide_enc12l768d").seq_len == 10_000


@BOTH_POOLS
def test_embedding_is_the_pooled_and_normalised_features(pool):
    model = make_encoder(pool=pool)
    tiles, coords = draw_slides()
    features = model.forward_features(tiles, coords)
    assert features.shape == (2, 1 + NUM_TILES, EMBED_DIM)
    embedding = model(tiles, coords)
    pooled = features[:, 0] if pool == "cls" else features[:, 1:].mean(1)
    assert torch.equal(embedding, model.norm(pooled))
    assert torch.equal(embedding, model.forward_head(features))


def test_tokens_are_tile_maps_plus_positions_behind_the_class_token():
    model, seen = make_encoder(), []
    model.stack.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    tiles, coords = draw_slides()
    model(tiles, coords)
    frequencies = [10000.0 ** (-i / 6) for i in range(6)]
    for slide, tile in ((0, 0), (1, 40)):
        x, y = (coords[slide, tile] // 256).tolist()
        expected = [
            f(cell * w) for cell in (y, x) for f in (math.sin, math.cos) for w in frequencies
        ]
        position = seen[0][slide, 1 + tile] - model.tile_embed(tiles[slide, tile])
        assert_close(position, torch.tensor(expected))
    assert torch.equal(seen[0][:, :1], model.cls_token.expand(2, 1, -1))


def test_positions_move_the_embedding_and_order_decides_the_segments():
    model = make_encoder()
    tiles, coords = draw_slides()
    assert not torch.allclose(model(tiles, coords), model(tiles, coords.flip(-1)), atol=1e-3)
    whole = make_encoder(segment_lengths=(100,), dilation_rates=(1,))
    assert_close(whole(tiles, coords), whole(tiles.flip(1), coords.flip(1)), atol=1e-5)


@BOTH_POOLS
@BOTH_RULES
def test_padded_batch_equals_the_slides_one_by_one(pool, rules):
    model = make_encoder(pool=pool, **rules)
    tiles, coords, mask = padded_slides()
    out = model(tiles, coords, mask)
    layers = model.layer_embeddings(tiles, coords, mask)
    for slide, length in enumerate((~mask).sum(1)):
        alone = tiles[slide : slide + 1, :length], coords[slide : slide + 1, :length]
        # Outputs are about 3 in size: equal but for the rounding of float32, as matrix products of
        # other sizes round differently.
        assert_close(out[slide : slide + 1], model(*alone), atol=3e-6)
        assert_close(layers[slide : slide + 1], model.layer_embeddings(*alone), atol=3e-6)


def test_padding_gets_no_gradient():
    model = make_encoder(pool="mean")
    tiles, coords, mask = padded_slides()
    tiles.requires_grad_()
    model(tiles, coords, mask).square().sum().backward()
    assert (tiles.grad[mask] == 0).all()
    assert (tiles.grad[~mask] != 0).any(-1).all()
    assert all(x.grad.isfinite().all() for x in model.parameters())


def test_layer_embeddings_are_states_before_the_last_norm_of_the_encoder():
    model = make_encoder(num_layers=3)
    tiles, coords = draw_slides()
    every = model.layer_embeddings(tiles, coords)
    assert every.shape == (2, 4, EMBED_DIM)
    assert torch.equal(model.layer_embeddings(tiles, coords, layers=(2, 0)), every[:, [2, 0]])
    # Layer i has seen i blocks.
    assert_close(every[:, 0], model.norm(model.cls_token[0]).expand(2, -1))
    shorter = make_encoder(num_layers=2)
    shorter.load_state_dict(
        {k: x for k, x in model.state_dict().items() if not k.startswith("stack.blocks.2")}
    )
    assert torch.equal(shorter.layer_embeddings(tiles, coords, layers=[2])[:, 0], every[:, 2])
    with torch.no_grad():
        model.stack.norm.weight.normal_()
    assert torch.equal(model.layer_embeddings(tiles, coords), every)
    assert not torch.allclose(model(tiles, coords), every[:, 3], atol=0.1)


@pytest.mark.parametrize("layers", [(), (-1,), (0, 3)])
def test_layers_that_do_not_exist_are_refused(layers):
    message = f"layers must be numbers of blocks from 0 to num_layers=2, got {layers}"
    with pytest.raises(ValueError, match=re.escape(message)):
        make_encoder().layer_embeddings(*draw_slides(), layers=layers)


def test_tile_size_scales_coordinates():
    model = make_encoder()
    tiles, coords = draw_slides()
    expected = model(tiles, coords)
    assert torch.equal(model(tiles, 2 * coords, tile_size=512), expected)
    assert torch.equal(make_and_load(model, tile_size=512)(tiles, 2 * coords), expected)
    assert torch.equal(model(tiles, coords + 255), expected)


def make_and_load(model, **options):
    other = GigaPathSlideEncoder(dataclasses.replace(model.config, **options))
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.uint16, torch.float32, torch.float64], ids=str
)
def test_coordinates_of_any_exact_dtype_give_the_same(dtype):
    model = make_encoder()
    tiles, coords, mask = padded_slides()
    coords = coords.clamp(min=0)
    assert torch.equal(model(tiles, coords.to(dtype), mask), model(tiles, coords, mask))


def test_a_larger_grid_needs_no_other_weights():
    model = make_encoder()
    tiles, coords = draw_slides()
    assert torch.equal(make_and_load(model, grid_size=2000)(tiles, coords), model(tiles, coords))


def test_reset_classifier_adds_replaces_and_removes_the_head():
    model = make_encoder().to(torch.bfloat16)
    tiles, coords = draw_slides()
    embedding = model(tiles, coords)
    assert (model.num_classes, model.num_features, model.embed_dim) == (0, EMBED_DIM, EMBED_DIM)
    assert model.get_classifier() is None
    model.reset_classifier(5)
    assert model.num_classes == model.config.num_classes == 5
    assert model.get_classifier().weight.dtype == torch.bfloat16
    logits = model(tiles, coords)
    assert torch.equal(logits, model.head(embedding))
    features = model.forward_features(tiles, coords)
    assert torch.equal(model.forward_head(features, pre_logits=True), embedding)
    assert torch.equal(make_and_load(model.float())(tiles, coords), model(tiles, coords))
    model.reset_classifier(0)
    assert model.get_classifier() is None
    assert model(tiles, coords).shape == (2, EMBED_DIM)


@BOTH_POOLS
def test_every_parameter_gets_a_gradient_and_checkpointing_the_same(pool):
    model = make_encoder(pool=pool, num_classes=3)
    tiles, coords, mask = padded_slides()
    grads = []
    for is_checkpointed in (False, True):
        model.set_grad_checkpointing(is_checkpointed)
        model.zero_grad()
        model(tiles, coords, mask).square().sum().backward()
        grads.append({name: x.grad.clone() for name, x in model.named_parameters()})
    without = [name for name, grad in grads[0].items() if not grad.abs().sum() > 0]
    # The mean leaves the class token out, but tiles attend to it; the softmax ignores key biases.
    assert [name for name in without if "k_proj.bias" not in name] == []
    torch.testing.assert_close(grads[0], grads[1], atol=0, rtol=0)


@BOTH_POOLS
def test_compiled_and_exported_models_equal_eager(pool):
    model = make_encoder(pool=pool, num_classes=3, num_layers=1)
    inputs = padded_slides()
    expected = model(*inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*inputs), expected)
    short = draw_slides(num_tiles=21)
    dynamic = {1: torch.export.Dim("num_tiles", min=2, max=400)}
    exported = torch.export.export(
        model,
        draw_slides(),
        dynamic_shapes={"tile_embeddings": dynamic, "coords": dynamic},
    )
    assert_close(exported.module()(*short), model(*short))
    padded = torch.export.export(model, inputs).module()
    assert_close(padded(*inputs), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@BOTH_POOLS
def test_autocast_is_close_to_float32_and_finite(dtype, pool):
    model = make_encoder(pool=pool)
    tiles, coords, mask = padded_slides()
    expected = model(tiles, coords, mask)
    with torch.autocast("cpu", dtype=dtype):
        out = model(tiles, coords, mask)
    assert 0 < (out.float() - expected).norm() / expected.norm() < 0.02
    out.float().square().sum().backward()
    assert all(x.grad.isfinite().all() for x in model.parameters())


def test_autocast_keeps_large_sums_of_tiles_finite():
    model = make_encoder(pool="mean").half()
    tiles, coords, mask = padded_slides()
    with torch.no_grad():
        model.stack.norm.bias.fill_(5000.0)
    features = model.forward_features(tiles, coords, mask)
    assert model.forward_head(features, mask).isfinite().all()


def test_half_model_takes_tiles_of_any_float_and_computes_exact_positions():
    model = make_encoder()
    tiles, coords = draw_slides()
    expected = model(tiles, coords)
    assert_close(model(tiles.double(), coords), expected)
    model.to(torch.bfloat16)
    out = model(tiles, coords)
    assert out.dtype == torch.bfloat16
    assert 0 < (out.float() - expected).norm() / expected.norm() < 0.03


def test_initial_gains_survive_construction():
    model = make_encoder(embed_dim=128, num_layers=3, ffn_dim=256, input_dim=200, num_classes=90)
    gain = math.sqrt(math.log(6))
    square, wide = math.sqrt(2 / 256), math.sqrt(2 / (128 + 256))  # Xavier
    for block in model.stack.blocks:
        for layer, std in (
            (block.attention.q_proj, square),
            (block.attention.v_proj, gain * square),
            (block.attention.out_proj, gain * square),
            (block.feed_forward.fc1, gain * wide),
            (block.feed_forward.fc2, gain * wide),
        ):
            assert layer.weight.std().item() == pytest.approx(std, rel=0.04)
    assert model.tile_embed.weight.std().item() == pytest.approx(math.sqrt(2 / 328), rel=0.04)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.04)
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.3)
    assert not model.tile_embed.bias.any()
    assert not model.head.bias.any()


@pytest.mark.parametrize(
    "options",
    [
        {"pool": "cls"},
        {"tile_size": 128},
        {"norm_eps": 1.0},
        {"segment_lengths": (7, 16, 31)},
        {"head_offset": "block"},
        {"padded_keys": "zero"},
    ],
    ids=str,
)
def test_every_option_changes_the_outputs(options):
    # The class token sees no incomplete segment by itself.
    model = make_encoder(pool="mean", grid_size=100)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    slides = draw_slides()
    other = make_and_load(model, **options)
    assert not torch.allclose(model(*slides), other(*slides, check_coords=False), atol=1e-4)


@pytest.mark.parametrize("rate", ["dropout", "drop_path", "attention_dropout"])
def test_dropout_acts_in_training_only(rate):
    model, slides = make_encoder(**{rate: 0.5}), draw_slides()
    assert not torch.equal(model(*slides), model(*slides))
    model.eval()
    assert torch.equal(model(*slides), model(*slides))


def test_dropout_acts_on_the_tokens_too():
    model, seen = make_encoder(dropout=0.5), []
    model.stack.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(*draw_slides())
    assert 0.3 < (seen[0] == 0).float().mean() < 0.7


def test_layer_decay_groups_go_from_stem_to_head():
    model = make_encoder(num_layers=3, num_classes=2)
    groups = param_groups_layer_decay(
        model, weight_decay=0.1, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5
    )
    names = {id(x): name for name, x in model.named_parameters()}
    scales = {names[id(x)]: group["lr_scale"] for group in groups for x in group["params"]}
    decays = {names[id(x)]: group["weight_decay"] for group in groups for x in group["params"]}
    assert scales["cls_token"] == scales["tile_embed.weight"] == 0.5**4
    assert scales["stack.blocks.0.attention.q_proj.weight"] == 0.5**3
    # As in timm's models, the last norms belong to the last block.
    assert scales["stack.blocks.2.ffn_norm.bias"] == scales["norm.weight"] == 0.5
    assert scales["stack.norm.bias"] == 0.5
    assert scales["head.weight"] == scales["head.bias"] == 1.0
    assert {name for name, decay in decays.items() if decay == 0} == model.no_weight_decay()
    assert {"cls_token", "head.bias", "norm.weight"} <= model.no_weight_decay()
    assert "head.weight" not in model.no_weight_decay()
    (coarse, _), _ = model.group_matcher(coarse=True)["blocks"]
    assert coarse == r"^stack\.blocks"


def test_saved_model_comes_back(tmp_path):
    model = make_encoder(num_classes=3, pool="mean").eval()
    slides = draw_slides()
    model.save_pretrained(tmp_path)
    again = GigaPathSlideEncoder.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(*slides), model(*slides))


def test_config_of_another_family_is_refused():
    config = find_model("longnet_lm_tiny").config
    with pytest.raises(TypeError, match="takes a GigaPathSlideConfig, got LongNetLMConfig"):
        GigaPathSlideEncoder(config)
    assert GigaPathSlideConfig(**SMALL) == make_encoder().config


@pytest.mark.parametrize("layers", [1, (1.0,), [True], torch.tensor(1)])
def test_layers_that_are_no_integers_are_refused(layers):
    with pytest.raises(TypeError, match=r"layers must be a sequence of integers, got .*1|True"):
        make_encoder().layer_embeddings(*draw_slides(), layers=layers)


def test_export_takes_other_batches_of_padded_slides():
    model, inputs = make_encoder(pool="mean"), padded_slides()
    batch, tiles = torch.export.Dim("batch", max=64), torch.export.Dim("tiles", min=4, max=400)
    shapes = ({0: batch, 1: tiles},) * 3
    program = torch.export.export(model, inputs, dynamic_shapes=shapes).module()
    others = [x[:2, :21] for x in inputs]
    assert_close(program(*others), model(*others))


@pytest.mark.parametrize("check_coords", [True, False])
def test_coordinates_are_checked_unless_told_otherwise(check_coords):
    model = make_encoder()
    tiles, coords = draw_slides()
    coords[1, 7] = coords[1, 3]
    if check_coords:
        with pytest.raises(ValueError, match=r"tiles 3 at .* and 7 at .* of slide 1"):
            model(tiles, coords)
    else:
        assert model(tiles, coords, check_coords=False).isfinite().all()
        coords[1, 7] = 256 * 20
        # No cell wraps into another row of the grid.
        with pytest.raises(ValueError, match=r"below grid_size .* got \(5120, 5120\) at tile 7"):
            model(tiles, coords, check_coords=False)
        with pytest.raises(ValueError, match="coords must be 0 or more, got"):
            model(tiles, -coords, check_coords=False)
