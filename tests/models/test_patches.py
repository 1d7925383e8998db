import pytest
import torch
from torch.nn import functional

from longnet_zoo.models.patches import PatchEmbed, resize_positions


def test_patches_are_embedded_row_by_row():
    embed = PatchEmbed(patch_size=3, in_chans=2, embed_dim=5)
    images = torch.randn(2, 2, 6, 9)
    tokens = embed(images)
    assert tokens.shape == (2, 2 * 3, 5)
    patch = images[1, :, 3:6, 6:9]  # second row, third column
    expected = embed.proj.weight.flatten(1) @ patch.flatten() + embed.proj.bias
    torch.testing.assert_close(tokens[1, 5], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("old", "new"), [((4, 4), (7, 7)), ((7, 3), (2, 9)), ((4, 9), (9, 4))])
def test_positions_follow_the_formula_of_dino(old, new):
    table = torch.randn(1, old[0] * old[1], 3)
    found = resize_positions(table, old_grid=old, new_grid=new)
    image = table.reshape(*old, 3).permute(2, 0, 1)[None]
    scale = ((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1])
    image = functional.interpolate(image, scale_factor=scale, mode="bicubic")
    assert image.shape[2:] == new
    assert torch.equal(found, image[0].permute(1, 2, 0).reshape(1, -1, 3))
    # The offset is not nothing.
    plain = resize_positions(table, old_grid=old, new_grid=new, offset=0)
    assert plain.shape == found.shape
    assert (plain - found).abs().max() > 1e-3


def test_plain_positions_are_resized_to_the_size():
    table = torch.randn(1, 35, 3)
    found = resize_positions(table, old_grid=(7, 5), new_grid=(9, 4), offset=0)
    image = table.reshape(7, 5, 3).permute(2, 0, 1)[None]
    image = functional.interpolate(image, size=(9, 4), mode="bicubic", align_corners=False)
    assert torch.equal(found, image[0].permute(1, 2, 0).reshape(1, -1, 3))


@pytest.mark.parametrize("side", range(1, 60, 7))
@pytest.mark.parametrize("old", [3, 14, 49])
def test_no_row_is_lost_to_rounding(old, side):
    table = torch.randn(1, old * old, 1)
    assert resize_positions(table, old_grid=(old, old), new_grid=(side, 5)).shape[1] == side * 5


def test_positions_of_the_same_grid_are_untouched():
    table = torch.randn(1, 6, 3)
    assert resize_positions(table, old_grid=(2, 3), new_grid=(2, 3)) is table


def test_half_positions_are_interpolated_in_float32():
    table = torch.randn(1, 16, 3).bfloat16()
    found = resize_positions(table, old_grid=(4, 4), new_grid=(6, 6))
    exact = resize_positions(table.float(), old_grid=(4, 4), new_grid=(6, 6))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.bfloat16())


def test_resampled_embedding_keeps_device_dtype_and_bias():
    embed = PatchEmbed(patch_size=4, in_chans=2, embed_dim=5).double().eval()
    new = embed.resampled(6)
    assert new.proj.weight.shape == (5, 2, 6, 6)
    assert new.proj.weight.dtype == torch.float64
    assert torch.equal(new.proj.bias, embed.proj.bias)
    assert not new.training
    assert new.patch_size == 6
    assert new(torch.zeros(1, 2, 12, 6).double()).shape == (1, 2, 5)


@pytest.mark.parametrize("size", [(0, 4), (4, 2), (8, 6)])
def test_images_without_whole_patches_are_refused(size):
    embed = PatchEmbed(patch_size=4, in_chans=2, embed_dim=5)
    assert embed.grid_size(8, 12) == (2, 3)
    with pytest.raises(ValueError, match=f"patch_size=4, got {size[0]} x {size[1]}"):
        embed.grid_size(*size)
