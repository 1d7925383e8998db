import csv

import numpy as np
import pytest

from recipes.classification_metrics import UNLABELLED
from recipes.icons import load_icons, render_icon, split_icons
from recipes.image_text_sources import (
    IconPages,
    IconPairs,
    ImageFolder,
    TableColumns,
    icon_classes,
    load_icon_pairs,
    load_table,
)
from tests.recipes.image_text_runs import write_table

FRACTIONS = {"val_fraction": 0.05, "test_fraction": 0.1}


@pytest.fixture(scope="module")
def icons():
    return split_icons(load_icons())["test"]


def table(folder, **options):
    defaults = {"columns": TableColumns(label="colour"), "max_pixels": 10**6, **FRACTIONS}
    return load_table(folder, **(defaults | options))


def test_icons_have_their_names_and_say_what_they_show(icons):
    pairs = IconPairs(icons=icons[:50], classes=("archive", "arrow"), size=16)
    assert pairs.names == [icon.name for icon in icons[:50]]
    expected = [
        {"archive": 0, "arrow": 1}.get(icon.caption.split()[0], UNLABELLED) for icon in icons[:50]
    ]
    assert pairs.labels == expected
    assert {UNLABELLED} < set(expected)
    image, caption = pairs.read(3)
    assert caption == icons[3].caption
    assert image.tobytes() == render_icon(icons[3], 16)[0].tobytes()
    drawn = [pairs.read(3, generator=np.random.default_rng(seed)) for seed in range(9)]
    assert len({(image.tobytes(), caption) for image, caption in drawn}) > 5


def test_classes_are_the_commonest_first_words_of_concepts():
    icons = split_icons(load_icons())["train"]
    classes = icon_classes(icons)
    assert len(set(classes)) == 20
    firsts = [concept.split()[0] for concept in {icon.concept for icon in icons}]
    counts = [firsts.count(name) for name in classes]
    assert counts == sorted(counts, reverse=True)
    assert classes[0] == max(set(firsts), key=firsts.count)


def test_page_shows_its_icon_first_and_names_all_in_reading_order(icons):
    pages = IconPages(icons=icons, cells=3, size=50)
    assert (len(pages.names), len(set(pages.names))) == (len(icons), len(icons))
    assert set(pages.labels) == {UNLABELLED}
    page, caption = pages.read(7)
    names = caption.split("; ")
    assert page.size == (50, 50)
    assert len(names) == 9
    assert names[0] == icons[7].caption
    # 16 pixels for each, and a margin of 1.
    by_name = {icon.caption: icon for icon in icons}
    found = 0
    for number, name in enumerate(names):
        row, column = divmod(number, 3)
        cell = page.crop((1 + 16 * column, 1 + 16 * row, 17 + 16 * column, 17 + 16 * row))
        found += cell.tobytes() == render_icon(by_name[name], 16)[0].tobytes()
    # Some names are those of several icons.
    assert found >= 7
    assert pages.read(7)[1] == caption
    drawn = {pages.read(7, generator=np.random.default_rng(seed))[1] for seed in range(5)}
    assert len(drawn) == 5
    assert all(names[0] in text.split("; ")[0] for text in drawn)


def test_long_captions_are_made_of_pages(icons):
    _, caption = IconPages(icons=icons, cells=22, size=22 * 8).read(0)
    assert 6_000 < len(caption.encode()) < 10_000


def test_splits_of_icons_share_no_icon_and_pages_are_made_of_their_own():
    classes, pairs = load_icon_pairs(size=16, pages=0, **FRACTIONS)
    assert len(classes) == 20
    names = [set(own.names) for own in pairs.values()]
    assert sum(map(len, names)) == len(set.union(*names)) == len(load_icons())
    no_classes, pages = load_icon_pairs(size=32, pages=2, **FRACTIONS)
    assert no_classes == ()
    allowed = {icon.caption for icon in pairs["test"].icons}
    assert set(pages["test"].read(0)[1].split("; ")) <= allowed


def test_cells_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match=r"pages=5 on an image of 32 x 32"):
        load_icon_pairs(size=32, pages=5, **FRACTIONS)


def test_table_has_paths_captions_classes_and_splits_by_hash(tmp_path):
    folder = write_table(tmp_path, per_colour=40)
    classes, pairs = table(folder)
    assert classes == ("blue", "green", "red")
    assert sum(len(own.names) for own in pairs.values()) == 120
    assert len(pairs["train"].names) > 80
    assert pairs["val"].names
    assert pairs["test"].names
    own = pairs["train"]
    image, caption = own.read(5)
    number = int(own.names[5].rsplit("/", 1)[1].removesuffix(".png"))
    colour = ("red", "green", "blue")[number % 3]
    assert caption == f"{colour} {number}"
    assert classes[own.labels[5]] == colour
    assert np.asarray(image).mean((0, 1)).argmax() == number % 3
    # A path keeps its split, wherever the folder lies and whatever else is in it.
    more = table(write_table(tmp_path / "more", per_colour=50))[1]
    for split, found in pairs.items():
        ends = {name.rsplit("/", 1)[1] for name in more[split].names}
        assert {name.rsplit("/", 1)[1] for name in found.names} <= ends


def test_table_may_say_which_split_a_pair_is_in_and_how_columns_are_called(tmp_path):
    write_table(tmp_path)
    (tmp_path / "pairs.jsonl").unlink()
    with (tmp_path / "captions.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["file_name", "text", "part"])
        writer.writeheader()
        for number, part in enumerate(["train", "test", "val", "test"]):
            row = {"file_name": f"{number:02d}.png", "text": f"one, {number}", "part": part}
            writer.writerow(row)
    columns = TableColumns(image="file_name", caption="text", split="part")
    for source in (tmp_path, tmp_path / "captions.csv"):
        classes, pairs = table(source, columns=columns)
        assert classes == ()
        captions = {split: list(own.captions) for split, own in pairs.items()}
        assert captions == {"train": ["one, 0"], "val": ["one, 2"], "test": ["one, 1", "one, 3"]}
        assert pairs["test"].labels == [UNLABELLED] * 2


def test_rows_without_a_class_have_none(tmp_path):
    folder = write_table(tmp_path, row2={"colour": ""})
    classes, pairs = table(folder, val_fraction=0.0, test_fraction=0.0)
    assert classes == ("blue", "green", "red")
    assert [label == UNLABELLED for label in pairs["train"].labels].index(True) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]\n", r"must be a JSON object, got \[1\] in row 1 of .*t.jsonl"),
        ('{"image": "a.png", "caption": "a"}\n{"image\n', "must be a JSON object.*in row 2 of"),
        ('{"caption": "a"}\n', "text in the column 'image', got None among caption in row 1"),
        ('{"image": "a.png"}\n', "text in the column 'caption', got None among image in row 1"),
        ('{"image": 1, "caption": "a"}\n', "text in the column 'image', got 1 among"),
        (
            '{"image": "a.png", "caption": "a", "split": "dev"}\n',
            "one of train, val, test, got 'dev' in row 1",
        ),
        (
            '{"image": "a.png", "caption": "a", "split": ["val"]}\n',
            r"one of train, val, test, got \['val'\] in row 1",
        ),
        ("[" * 100_000, "must be a JSON object, got maximum recursion depth .* in row 1"),
    ],
)
def test_damaged_tables_are_refused_by_row(tmp_path, content, message):
    (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        table(tmp_path, columns=TableColumns())


def test_table_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "pairs.csv").write_bytes("image,caption\na.png,caf\xe9\n".encode("latin-1"))
    message = r"UTF-8, got .*byte 0xe9.* in .*pairs\.csv\. Save it as such"
    with pytest.raises(ValueError, match=message):
        table(tmp_path, columns=TableColumns())


def test_a_caption_is_not_cut_at_a_comma(tmp_path):
    (tmp_path / "pairs.csv").write_text("image,caption\na.png,a dog, running\n")
    with pytest.raises(ValueError, match=r"got ' running' behind them in line 2 of .*pairs\.csv"):
        table(tmp_path, columns=TableColumns())


def test_what_is_no_table_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"one .csv or .jsonl file.*with none"):
        table(tmp_path)
    for name in ("a.csv", "b.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=r"one .csv or .jsonl file.*with a.csv, b.jsonl"):
        table(tmp_path)
    with pytest.raises(ValueError, match=r"got '.*c.txt'"):
        table(tmp_path / "c.txt")


def test_an_image_without_a_caption_is_refused_when_it_is_read(tmp_path):
    changes = {"row1": {"caption": " "}, "row2": {"caption": None}}
    folder = write_table(tmp_path, **changes)
    pairs = table(folder, val_fraction=0.0, test_fraction=0.0)[1]["train"]
    for place in (0, 1):
        message = rf"an empty one for .*0{place}.png in row {place + 1} of .*pairs.jsonl"
        with pytest.raises(ValueError, match=message):
            pairs.read(place)


def test_folder_to_search_has_paths_for_captions(tmp_path):
    folder = write_table(tmp_path)
    images = ImageFolder(str(folder), max_pixels=10**6)
    assert len(images.names) == 18
    assert images.names[0].endswith("00.png")
    image, caption = images.read(4)
    assert caption == images.names[4]
    assert np.asarray(image).mean((0, 1)).argmax() == 1
    with pytest.raises(ValueError, match=r"max_pixels=9 pixels, got 16 x 16"):
        ImageFolder(str(folder), max_pixels=9).read(0)
