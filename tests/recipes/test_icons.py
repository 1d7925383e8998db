import importlib.util
import re

import numpy as np
import pytest

from recipes.icons import (
    COLOURS,
    STYLE_WORDS,
    Icon,
    icon_fingerprint,
    load_icons,
    render_icon,
    split_icons,
)


@pytest.fixture(scope="module")
def icons():
    return load_icons()


def icon(name, *, concept=None, image_id=0):
    return Icon(
        name=name,
        caption=name,
        concept=concept or name,
        font="",
        character="x",
        image_id=image_id,
    )


def test_icons_are_those_of_six_fonts_with_their_names(icons):
    assert len(load_icons(with_logos=True)) == 16_545
    assert len(icons) == 15_942
    assert len({icon.name for icon in icons}) == len(icons)
    assert {icon.name.split("/")[0] for icon in icons} == {
        "codicon",
        "elusiveicons",
        "fontawesome6-regular",
        "fontawesome6-solid",
        "materialdesignicons6",
        "phosphor",
        "remixicon",
    }
    by_name = {icon.name: icon for icon in icons}
    assert by_name["phosphor/bell-bold"].caption == "bell bold"
    assert by_name["phosphor/bell-bold"].concept == "bell"
    assert by_name["remixicon/home-2-fill"].concept == "home"
    assert by_name["phosphor/line-segment"].concept == "line segment"
    assert all(re.fullmatch(r"[a-z0-9 ]+", icon.caption) for icon in icons)
    last = {icon.concept.split()[-1] for icon in icons if " " in icon.concept}
    assert not last & STYLE_WORDS
    # It is a space.
    assert "codicon/blank" not in by_name


def test_logos_are_left_out_by_name(icons):
    names = {icon.name for icon in icons}
    for name in (
        "phosphor/google-play-logo",
        "elusiveicons/stackoverflow",
        "materialdesignicons6/apple",
        "materialdesignicons6/folder-google-drive",
        "materialdesignicons6/language-python",
        "remixicon/skype-fill",
    ):
        assert name not in names
    assert {"materialdesignicons6/food-apple", "phosphor/stack"} <= names


def test_no_concept_no_name_and_no_bitmap_is_in_two_splits(icons):
    splits = split_icons(icons)
    assert sum(map(len, splits.values())) == len(icons)
    assert len(splits["test"]) > 1_000
    for value in ("concept", "caption", "image_id"):
        found = [{getattr(icon, value) for icon in own} for own in splits.values()]
        assert sum(map(len, found)) == len(set.union(*found))
    # A bitmap with names of two concepts, and names with two bitmaps, are what makes it hard.
    assert len({icon.image_id for icon in icons}) < len(icons)
    assert len({icon.caption for icon in icons}) < len(icons)


def test_icons_that_look_the_same_bring_their_concepts_together():
    chain = [
        icon("a", image_id=1),
        icon("b", image_id=1),
        icon("b bold", concept="b", image_id=2),
        icon("c", image_id=2),
    ]
    for fraction in (0.2, 0.5, 0.8):
        splits = split_icons(chain, val_fraction=0.1, test_fraction=fraction)
        assert sorted(map(len, splits.values())) == [0, 0, 4]
    assert len(split_icons(chain, val_fraction=0.0, test_fraction=0.0)["train"]) == 4


def test_fingerprint_knows_what_is_where(icons):
    splits = split_icons(icons)
    assert icon_fingerprint(splits) == icon_fingerprint(split_icons(icons))
    assert icon_fingerprint(splits) != icon_fingerprint(split_icons(icons, test_fraction=0.2))
    few = {"train": [icon("a", image_id=0), icon("b", image_id=1)]}
    same = {"train": [icon("a", image_id=0), icon("b", image_id=0)]}
    assert icon_fingerprint(few) != icon_fingerprint(same)


@pytest.mark.parametrize("size", [16, 33])
def test_every_icon_is_drawn_in_the_middle_and_fills_it(icons, size):
    for one in icons[::400]:
        image, caption = render_icon(one, size)
        assert (image.size, image.mode, caption) == ((size, size), "RGB", one.caption)
        ink = np.asarray(image).min(-1) < 200
        rows, columns = np.nonzero(ink)
        spans = [rows.max() - rows.min() + 1, columns.max() - columns.min() + 1]
        assert 0.6 * size <= max(spans) <= 0.9 * size
        for places in (rows, columns):
            assert abs((places.max() + places.min() + 1) / 2 - size / 2) <= 1.5
        # A margin on all sides.
        assert not ink[0].any()
        assert not ink[:, -1].any()


def test_colour_is_in_the_caption_and_in_the_image(icons):
    found = {}
    for seed in range(120):
        one = icons[seed * 100]
        image, caption = render_icon(one, 32, generator=np.random.default_rng(seed))
        colour = caption.removesuffix(one.caption).strip()
        darkest = min(image.getcolors(32 * 32), key=lambda entry: sum(entry[1]))[1]
        if colour:
            assert np.abs(np.subtract(darkest, COLOURS[colour])).max() < 60
        else:
            assert max(darkest) < 120
        found[colour] = found.get(colour, 0) + 1
    assert set(found) == {"", *COLOURS}
    assert 40 < found[""] < 80


def test_size_and_place_are_drawn_by_the_generator(icons):
    def box(seed):
        image, _ = render_icon(icons[7], 64, generator=np.random.default_rng(seed))
        rows, columns = np.nonzero(np.asarray(image).min(-1) < 250)
        return rows.min(), rows.max(), columns.min(), columns.max()

    boxes = [box(seed) for seed in range(20)]
    assert boxes == [box(seed) for seed in range(20)]
    assert len(set(boxes)) > 15
    heights = [bottom - top for top, bottom, _, _ in boxes]
    assert max(heights) > 1.2 * min(heights)


def test_without_the_package_an_error_names_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"qtawesome, .* pip install qtawesome==1.4.2"):
        load_icons.__wrapped__()
