import shutil
import warnings
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from recipes.image_files import ImageFiles, find_images, load_images, read_image
from tests.recipes.classification_runs import CLASSES, write_images

OPTIONS = {"val_fraction": 0.2, "test_fraction": 0.2, "max_pixels": 10**6}


def test_digits_are_the_ones_of_the_data_set():
    classes, splits = load_images("digits", **OPTIONS)
    assert classes == tuple("0123456789")
    labels = [label for images in splits.values() for label in images.labels]
    # The counts of the UCI test set, class by class.
    assert [Counter(labels)[i] for i in range(10)] == [
        *(178, 182, 177, 183, 181, 182, 181, 179, 174, 180)
    ]
    names = [name for images in splits.values() for name in images.names]
    assert len(set(names)) == 1797
    sizes = {split: len(images) for split, images in splits.items()}
    assert 300 < sizes["val"] < 420
    assert 300 < sizes["test"] < 420
    split, place = next(
        (split, images.names.index("digits/0000"))
        for split, images in splits.items()
        if "digits/0000" in images.names
    )
    image = splits[split].read(place)
    assert (image.mode, image.size) == ("RGB", (8, 8))
    assert splits[split].labels[place] == 0
    # The first row of the file, 0 0 5 13 9 1 0 0 of 16.
    expected = [level * 255 // 16 for level in (0, 0, 5, 13, 9, 1, 0, 0)]
    assert np.asarray(image)[0, :, 1].tolist() == expected


def test_folder_is_split_by_path_and_stays_so_when_images_come(tmp_path):
    folder = write_images(tmp_path / "images", per_class=20)
    classes, before = load_images(str(folder), **OPTIONS)
    assert classes == tuple(sorted(CLASSES))
    for split in before.values():
        for name, label in zip(split.names, split.labels, strict=True):
            assert f"/{classes[label]}/" in name
    assert len(before["val"]) > 3
    assert len(before["test"]) > 3
    Image.new("RGB", (4, 4)).save(folder / "red" / "aaa.png")
    _, after = load_images(str(folder), **OPTIONS)
    assert sum(map(len, after.values())) == 61
    for split, images in before.items():
        assert set(images.names) <= set(after[split].names)
    # The place of the folder does not matter.
    moved = folder.rename(tmp_path / "elsewhere")
    _, again = load_images(str(moved), **OPTIONS)
    assert [n.split("/")[-2:] for n in again["val"].names] == [
        n.split("/")[-2:] for n in after["val"].names
    ]


def test_given_splits_are_taken(tmp_path):
    for split, number in (("train", 5), ("test", 2)):
        write_images(tmp_path / split, per_class=number)
    _, splits = load_images(str(tmp_path), **{**OPTIONS, "val_fraction": 0.0})
    assert {split: len(images) for split, images in splits.items()} == {
        "train": 15,
        "val": 0,
        "test": 6,
    }
    # Without a folder `val`, some of `train` are held out.
    _, splits = load_images(str(tmp_path), **{**OPTIONS, "val_fraction": 0.4})
    assert len(splits["val"]) + len(splits["train"]) == 15
    assert len(splits["val"]) > 1
    (tmp_path / "val").mkdir()
    with pytest.raises(ValueError, match=r"a folder 'val' must hold images .*, got none in .*val"):
        load_images(str(tmp_path), **OPTIONS)
    (tmp_path / "val").rmdir()
    write_images(tmp_path / "val", per_class=1)
    _, splits = load_images(str(tmp_path), **{**OPTIONS, "val_fraction": 0.4})
    assert {split: len(images) for split, images in splits.items()} == {
        "train": 15,
        "val": 3,
        "test": 6,
    }


def test_a_held_out_split_may_have_one_class(tmp_path):
    for split in ("train", "val"):
        write_images(tmp_path / split, per_class=2)
    for name in ("red", "blue"):
        shutil.rmtree(tmp_path / "val" / name)
    classes, splits = load_images(str(tmp_path), **OPTIONS)
    assert classes == tuple(sorted(CLASSES))
    assert splits["val"].labels == (classes.index("green"),) * 2


def test_hidden_files_are_no_images(tmp_path):
    write_images(tmp_path, per_class=1)
    before = find_images(str(tmp_path))
    # Such as other systems leave beside each file of a copied folder.
    (tmp_path / "red" / "._00.png").write_bytes(b"no image")
    (tmp_path / "red" / ".thumbnails").mkdir()
    shutil.copy(before[0], tmp_path / "red" / ".thumbnails" / "a.png")
    assert find_images(str(tmp_path)) == before
    _, splits = load_images(str(tmp_path), **{**OPTIONS, "val_fraction": 0, "test_fraction": 0})
    assert sorted(splits["train"].names) == before


def test_bad_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"got '.*nowhere', which is no folder"):
        load_images(str(tmp_path / "nowhere"), **OPTIONS)
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match="two or more classes, got cat in"):
        load_images(str(tmp_path), **OPTIONS)
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"got none in .* for cat, dog"):
        load_images(str(tmp_path), **OPTIONS)


def test_class_without_training_images_is_refused(tmp_path):
    write_images(tmp_path / "train")
    (tmp_path / "val" / "red").mkdir(parents=True)
    (tmp_path / "val" / "violet").mkdir()
    with pytest.raises(ValueError, match=r"got violet in .*val and not in .*train"):
        load_images(str(tmp_path), **OPTIONS)


def test_image_is_read_as_rgb(tmp_path):
    for mode, value in (("L", 7), ("RGBA", (7, 7, 7, 255)), ("P", 0), ("CMYK", (0, 0, 0, 0))):
        Image.new(mode, (3, 2), value).save(tmp_path / "a.tif")
        image = read_image(tmp_path / "a.tif", max_pixels=6)
        assert (image.mode, image.size) == ("RGB", (3, 2))
    assert image.getpixel((0, 0)) == (255, 255, 255)


def test_what_is_transparent_is_white(tmp_path):
    image = Image.new("RGBA", (3, 2), (0, 0, 0, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    image.save(tmp_path / "a.png")
    grey = Image.new("LA", (3, 2), (0, 0))
    grey.save(tmp_path / "b.png")
    found = read_image(tmp_path / "a.png", max_pixels=6)
    assert (found.getpixel((0, 0)), found.getpixel((1, 0))) == ((255,) * 3, (10, 20, 30))
    assert read_image(tmp_path / "b.png", max_pixels=6).getpixel((0, 0)) == (255,) * 3


def test_images_stand_as_the_camera_was_held(tmp_path):
    image = Image.new("RGB", (16, 8))
    image.paste((255, 255, 255), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: turn clockwise to look at it.
    image.save(tmp_path / "a.png", exif=exif)
    found = read_image(tmp_path / "a.png", max_pixels=1000)
    assert found.size == (8, 16)
    assert (found.getpixel((4, 0)), found.getpixel((4, 15))) == ((255,) * 3, (0,) * 3)


def test_image_of_too_many_pixels_is_refused(tmp_path):
    Image.new("L", (30, 20)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"max_pixels=599 .* 30 x 20 = 600 in .*max_pixels 600"):
        read_image(tmp_path / "a.png", max_pixels=599)


def test_pillows_own_limit_neither_counts_nor_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    Image.new("L", (30, 20)).save(tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(tmp_path / "a.png", max_pixels=600).size == (30, 20)
    assert Image.MAX_IMAGE_PIXELS == 10


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_image_of_more_than_8_bits_is_refused(tmp_path, mode):
    Image.new(mode, (3, 2)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=f"8 bits a channel, got Pillow's mode '{mode}'"):
        read_image(tmp_path / "a.tif", max_pixels=100)


def test_damaged_files_are_named(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    Image.fromarray(np.random.randint(0, 255, (40, 40, 3), np.uint8)).save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    for name in ("text.png", "cut.png", "missing.png"):
        with pytest.raises(OSError, match=f"cannot read .*{name}: "):
            read_image(tmp_path / name, max_pixels=10**6)


def test_images_to_predict_are_found(tmp_path):
    write_images(tmp_path / "a", per_class=1)
    assert find_images(str(tmp_path)) == sorted(str(p) for p in tmp_path.rglob("*.png"))
    one = str(tmp_path / "a" / "red" / "00.png")
    assert find_images(one) == [one]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty' must be an image or a folder with images"):
        find_images(str(tmp_path / "empty"))


def test_some_of_the_images_can_be_taken():
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    images = ImageFiles(names=("a", "b", "c"), labels=(0, 1, 2), pixels=pixels, max_pixels=4)
    some = images.take([2, 0])
    assert (some.names, some.labels, len(some)) == (("c", "a"), (2, 0), 2)
    assert np.asarray(some.read(0))[:, :, 0].tolist() == [[8, 9], [10, 11]]
