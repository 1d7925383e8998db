import sys

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from recipes.slide_files import list_slides, read_layout, read_slide

TILES = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
COORDS = torch.arange(14).reshape(7, 2) * 256


def write_hdf5(path, **arrays):
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file[name] = np.asarray(values)
        # As some tile encoders leave it: text and groups beside the arrays.
        file["encoder"] = "a name"
        file.create_group("annotations")


def write(path, **arrays):
    """Writes arrays in the format that the suffix says."""
    if path.suffix in (".h5", ".hdf5"):
        write_hdf5(path, **arrays)
    elif path.suffix == ".safetensors":
        save_file({name: torch.as_tensor(x).contiguous() for name, x in arrays.items()}, path)
    elif path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        torch.save({name: torch.as_tensor(x) for name, x in arrays.items()}, path)
    return path


@pytest.mark.parametrize("suffix", [".h5", ".hdf5", ".pt", ".pth", ".safetensors", ".npz"])
@pytest.mark.parametrize("names", [("features", "coords"), ("tile_embeds", "coordinates")])
@pytest.mark.parametrize("has_batch", [False, True])
def test_formats_names_and_a_batch_axis_are_read(tmp_path, suffix, names, has_batch):
    arrays = [x[None] if has_batch else x for x in (TILES, COORDS)]
    path = write(tmp_path / f"a{suffix}", **dict(zip(names, arrays, strict=True)))
    tiles, coords = read_slide(path)
    assert tiles.dtype == coords.dtype == torch.float32
    assert torch.equal(tiles, TILES)
    assert torch.equal(coords, COORDS.float())
    dim, coords = read_layout(path)
    assert dim == 5
    assert torch.equal(coords, COORDS.float())


@pytest.mark.parametrize("name", ["feats", "embeddings"])
def test_other_names_of_the_tiles(tmp_path, name):
    path = write(tmp_path / "a.npz", **{name: TILES, "coords": COORDS, "other": np.zeros(3)})
    assert torch.equal(read_slide(path)[0], TILES)


def test_half_precision_and_big_endian_become_float32(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"features": TILES.bfloat16(), "coords": COORDS.to(torch.int32)}, path)
    assert torch.equal(read_slide(path)[0], TILES.bfloat16().float())
    write_hdf5(tmp_path / "a.h5", features=TILES.numpy().astype(">f8"), coords=COORDS.numpy())
    assert torch.equal(read_slide(tmp_path / "a.h5")[0], TILES)


@pytest.mark.parametrize(
    ("tiles", "coords"),
    [(TILES.tolist(), COORDS.tolist()), (list(TILES), [tuple(row) for row in COORDS.tolist()])],
)
def test_lists_in_a_torch_file_are_read(tmp_path, tiles, coords):
    torch.save({"tile_embeds": tiles, "coords": coords, "slide": "a"}, tmp_path / "a.pt")
    read = read_slide(tmp_path / "a.pt")
    assert torch.equal(read[0], TILES)
    assert torch.equal(read[1], COORDS.float())


def test_a_torch_file_of_the_old_format_is_read(tmp_path):
    content = {"features": TILES, "coords": COORDS}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_slide(tmp_path / "a.pt")[0], TILES)


@pytest.mark.parametrize("suffix", [".h5", ".pt", ".safetensors", ".npz"])
@pytest.mark.parametrize("keep", [0, 60])
def test_a_damaged_file_is_named(tmp_path, suffix, keep):
    path = write(tmp_path / f"a{suffix}", features=TILES, coords=COORDS)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"a\{suffix} is damaged, or no \{suffix} file at all"):
        read_slide(path)


def test_objects_in_a_torch_file_are_refused(tmp_path):
    torch.save({"features": TILES.numpy(), "coords": COORDS}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt is damaged.*Store tensors or lists"):
        read_slide(tmp_path / "a.pt")


def test_tiles_without_coordinates_are_refused(tmp_path):
    torch.save(TILES, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt must hold a dict .* got a Tensor: without coord"):
        read_slide(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"features": TILES, "xy": COORDS},
            r"a\.npz must hold exactly one of \('coords', 'coordinates'\), got none among its "
            r"entries \['features', 'xy'\]",
        ),
        (
            {"features": TILES, "feats": TILES, "coords": COORDS},
            r"got \['features', 'feats'\] among",
        ),
        ({"features": TILES, "coords": COORDS[:6]}, r"got \(7, 5\) and \(6, 2\)"),
        ({"features": TILES[:0], "coords": COORDS[:0]}, r"got \(0, 5\) and \(0, 2\)"),
        ({"features": TILES[0], "coords": COORDS}, r"got \(5,\) and \(7, 2\)"),
        ({"features": torch.stack([TILES] * 2), "coords": COORDS}, r"got \(2, 7, 5\) and \(7, 2\)"),
    ],
)
def test_names_and_shapes_are_checked(tmp_path, arrays, message):
    path = write(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        read_slide(path)
    with pytest.raises(ValueError, match=message):
        read_layout(path)


@pytest.mark.parametrize(("name", "bad"), [("tiles", float("nan")), ("coords", float("inf"))])
def test_values_that_are_not_finite_are_named(tmp_path, name, bad):
    arrays = {"tiles": TILES.clone(), "coords": COORDS.float()}
    arrays[name][4:6, 1] = bad
    path = write(tmp_path / "a.npz", features=arrays["tiles"], coords=arrays["coords"])
    with pytest.raises(ValueError, match=rf"{name} must be finite.* 2 of 7 rows, .* is row 4"):
        read_slide(path)


def test_a_path_that_is_no_slide_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a slide must be an existing file, got .*a\.h5"):
        read_slide(tmp_path / "a.h5")
    with pytest.raises(ValueError, match=r"a slide must be a file of \('\.h5'.*a\.svs"):
        read_slide(tmp_path / "a.svs")


def test_hdf5_without_h5py_says_what_to_install(tmp_path, monkeypatch):
    path = write(tmp_path / "a.h5", features=TILES, coords=COORDS)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(RuntimeError, match=r"a\.h5 needs h5py.*pip install h5py"):
        read_slide(path)


def test_slides_of_a_folder_are_listed_by_id(tmp_path):
    for name in ("b.pt", "a.h5", "notes.txt", "c.svs", "._a.h5"):
        (tmp_path / name).touch()
    assert list_slides(tmp_path) == {"a": tmp_path / "a.h5", "b": tmp_path / "b.pt"}


def test_a_folder_without_clear_slides_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must hold files that end in .*, got none"):
        list_slides(tmp_path)
    for name in ("a.h5", "a.pt"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"a slide must be one file, got a\.h5 and a\.pt"):
        list_slides(tmp_path)
    with pytest.raises(ValueError, match=r"lie in a folder, got .*nowhere"):
        list_slides(tmp_path / "nowhere")
