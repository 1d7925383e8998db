"""Patches, positions and the methods of timm that give what the blocks return."""

import pytest
import torch

from tests.models.small_vision import CLASSES, EMBED_DIM, LAYERS, draw, make


@pytest.mark.parametrize(("height", "width"), [(4, 4), (28, 20), (20, 28), (36, 12), (64, 4)])
def test_any_whole_number_of_patches_works(height, width):
    model = make()
    assert model(draw(height=height, width=width)).isfinite().all()
    assert model.config.grid == (7, 5)
    assert model.pos_embed.shape == (1, 35, EMBED_DIM)


def test_input_size_does_not_change_the_output():
    model, images = make().eval(), draw(height=44, width=12)
    expected = model(images)
    model.pos_embed.requires_grad_(False)
    model.set_input_size(img_size=(44, 12))
    assert model.config.img_size == (44, 12)
    assert model.pos_embed.shape == (1, 33, EMBED_DIM)
    assert not model.pos_embed.requires_grad
    assert torch.equal(model(images), expected)


def test_patch_size_keeps_what_patches_mean():
    model = make().eval()
    # FlexiViT's resampling: patches enlarged by the same interpolation give the same tokens.
    image = torch.randn(1, 3, 1, 1).expand(1, 3, 8, 8)  # constant: any enlargement keeps it
    small = model.patch_embed(image[..., :4, :4])
    model.set_input_size(img_size=(56, 40), patch_size=8)
    assert model.patch_embed.proj.weight.shape == (EMBED_DIM, 3, 8, 8)
    torch.testing.assert_close(model.patch_embed(image), small, atol=1e-4, rtol=1e-4)
    assert model.config.grid == (7, 5)
    assert [info["reduction"] for info in model.feature_info] == [8] * LAYERS
    assert model(draw(height=56, width=40)).shape == (2, CLASSES)


def test_no_weight_decay_names_norms_biases_and_positions():
    model = make()
    expected = {key for key, x in model.named_parameters() if x.ndim == 1} | {"pos_embed"}
    assert model.no_weight_decay() == expected


@pytest.mark.parametrize(
    ("indices", "taken"), [(None, [0, 1, 2]), (2, [1, 2]), ([-1, 0], [0, 2]), ((1,), [1])]
)
def test_intermediates_are_what_the_blocks_return(indices, taken):
    model, images = make(), draw()
    features, states = model.stack(model.embed(images), return_hidden_states=True)
    final, found = model.forward_intermediates(images, indices, output_fmt="NLC")
    assert torch.equal(final, features)
    torch.testing.assert_close(found, [states[number + 1] for number in taken], atol=0, rtol=0)
    maps = model.forward_intermediates(images, indices, intermediates_only=True)
    for tokens, grid in zip(found, maps, strict=True):
        assert grid.shape == (2, EMBED_DIM, 7, 5)
        assert torch.equal(grid[:, :, 3, 2], tokens[:, 3 * 5 + 2])


def test_stopping_early_runs_no_more_blocks():
    model, images = make(), draw()
    ran = []
    for number, block in enumerate(model.stack.blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    final, found = model.forward_intermediates(images, [1], stop_early=True, output_fmt="NLC")
    assert ran == [0, 1]
    assert torch.equal(final, found[0])
    model.get_intermediate_layers(images, [0])
    assert ran == [0, 1, 0]


def test_depth_groups_put_the_stem_first_and_the_head_last():
    from timm.models import group_parameters

    model = make()
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert groups["pos_embed"] == groups["patch_embed.proj.weight"] == 0
    assert [groups[f"stack.blocks.{i}.attention.q_proj.weight"] for i in range(3)] == [1, 2, 3]
    assert groups["head.weight"] == groups["fc_norm.weight"] == max(groups.values())
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert {coarse[key] for key in coarse if key.startswith("stack.")} == {1}


@pytest.mark.parametrize(
    ("images", "error", "match"),
    [
        (torch.zeros(2, 1, 28, 20), ValueError, r"in_chans=3, got \(2, 1, 28, 20\)"),
        (torch.zeros(3, 28, 20), ValueError, r"in_chans=3, got \(3, 28, 20\)"),
        (torch.zeros(0, 3, 28, 20), ValueError, r"got \(0, 3, 28, 20\)"),
        (torch.zeros(2, 3, 28, 21), ValueError, "multiples of patch_size=4, got 28 x 21"),
        (torch.zeros(2, 3, 28, 20, dtype=torch.uint8), TypeError, "got torch.uint8"),
    ],
)
def test_bad_images_are_refused(images, error, match):
    model = make()
    for call in (model, model.forward_intermediates):
        with pytest.raises(error, match=match):
            call(images)


def test_bad_indices_and_formats_are_refused():
    model, images = make(), draw()
    with pytest.raises(ValueError, match=r"\[1, 3\], got 4"):
        model.forward_intermediates(images, 4)
    with pytest.raises(ValueError, match=r"the 3 blocks, in \[-3, 3\), got \[0, 3\]"):
        model.get_intermediate_layers(images, [0, 3])
    with pytest.raises(ValueError, match=r"the 3 blocks, .* got \[\]"):
        model.prune_intermediate_layers([])
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW' or 'NLC', got 'NHWC'"):
        model.forward_intermediates(images, output_fmt="NHWC")
    with pytest.raises(ValueError, match="return_prefix_tokens must be False, got True"):
        model.get_intermediate_layers(images, return_prefix_tokens=True)


def test_bad_input_size_changes_nothing():
    model, images = make().eval(), draw()
    expected = model(images)
    with pytest.raises(ValueError, match="patch_size=5, got"):
        model.set_input_size(patch_size=5)
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize("n", [[1.5], True, 1.0])
def test_blocks_that_are_no_integers_are_refused(n):
    with pytest.raises(TypeError, match=r"indices must be a sequence of integers, got .*(1|True)"):
        make().get_intermediate_layers(draw(), n=n)
