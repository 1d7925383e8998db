import logging

import pytest

from recipes.classification import UNLABELLED
from recipes.slide_folder import load_folder, load_unlabelled
from tests.recipes.slide_runs import CLASSES, DIM, write_labels, write_slides


@pytest.fixture
def slides(tmp_path):
    return write_slides(tmp_path / "slides")


def load(slides, labels, **options):
    fractions = {"val_fraction": 0.25, "test_fraction": 0.25, "on_error": "raise"}
    return load_folder(slides, labels=labels, **{**fractions, **options})


def names(found):
    return [found[i].name for i in range(len(found.labels))]


def test_the_tables_splits_and_classes_are_taken(slides, tmp_path):
    classes, found, dim = load(slides, write_labels(tmp_path / "labels.csv"))
    assert (classes, dim) == (CLASSES, DIM)
    assert names(found["train"]) == [f"slide_{i:02d}" for i in range(6)]
    assert names(found["val"]) == ["slide_06", "slide_07", "slide_08"]
    assert found["train"].labels == (0, 1, 0, 1, 0, 1)
    slide = found["test"][1]
    assert (slide.name, slide.label, slide.tiles.shape) == ("slide_10", 0, (9, DIM))


def test_without_splits_a_hash_of_the_slide_decides(slides, tmp_path):
    table = write_labels(tmp_path / "labels.csv", split=None)
    split_of = {}
    for _ in range(2):
        _, found, _ = load(slides, table)
        split_of = {name: split for split in found for name in names(found[split])}
        assert len(split_of) == 12
    # A slide stays where it is when others come and go.
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0], *lines[4:]]))
    _, found, _ = load(slides, table)
    assert {name: split for split in found for name in names(found[split])}.items() < (
        split_of.items()
    )
    assert len(set(split_of.values())) > 1


def test_slides_of_a_patient_are_in_one_split(slides, tmp_path):
    patients = [f"patient {i // 4}" for i in range(12)]
    table = write_labels(tmp_path / "labels.csv", split=None, patient_id=patients)
    _, found, _ = load(slides, table)
    splits = [{int(name[-2:]) // 4 for name in names(found[split])} for split in found]
    assert sum(map(len, splits)) == 3


def test_nothing_held_out_is_possible(slides, tmp_path):
    table = write_labels(tmp_path / "labels.csv", split=None)
    _, found, _ = load(slides, table, val_fraction=0, test_fraction=0)
    assert len(found["train"].labels) == 12
    assert not found["val"].labels


def test_slides_that_cannot_be_used_stop_or_are_logged(slides, tmp_path, caplog):
    table = write_labels(tmp_path / "labels.csv")
    (slides / "slide_03.safetensors").unlink()
    (slides / "slide_07.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"2 of 12 .*: slide_03 is not in .*slide_07.*damaged"):
        load(slides, table)
    with caplog.at_level(logging.WARNING):
        _, found, _ = load(slides, table, on_error="skip")
    assert "skipped 2 of 12 labelled slides: slide_03 is not in" in caplog.text
    assert [len(found[split].labels) for split in found] == [5, 2, 3]


def test_skipping_all_slides_is_an_error(slides, tmp_path):
    for path in slides.iterdir():
        path.write_bytes(b"short")
    with pytest.raises(ValueError, match=r"12 of 12 labelled slides cannot be used.*and 7 more"):
        load(slides, write_labels(tmp_path / "labels.csv"), on_error="skip")


def test_slides_without_a_label_are_named(slides, tmp_path, caplog):
    table = write_labels(tmp_path / "labels.csv")
    table.write_text("\n".join(table.read_text().splitlines()[:-2]))
    load(slides, table)
    assert "left out, for want of a label: slide_10, slide_11" in caplog.text


def test_embeddings_of_another_size_are_named(slides, tmp_path):
    write_slides(slides, count=1, dim=9)
    with pytest.raises(ValueError, match=r"same embedding size, got \{9: 'slide_00', 5: 'slide"):
        load(slides, write_labels(tmp_path / "labels.csv"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide,label\na,b", r"columns slide_id and label, got \['slide', 'label'\]"),
        ("slide_id,label\nslide_00,", r"line 2: .*not be empty, got 'slide_00' and ''"),
        ("slide_id,label\nslide_00,x\nslide_00,y", r"line 3: .* one line, got 'slide_00' again"),
        ("slide_id,label,split\nslide_00,x,dev", r"line 2: split must be one of .*got 'dev'"),
        (
            "slide_id,label,split\nslide_00,x,train\nslide_01,y,val",
            r"a slide in the training split, got none for \['y'\]",
        ),
    ],
)
def test_a_bad_table_is_refused(slides, tmp_path, text, message):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(slides, tmp_path / "labels.csv")


def test_a_missing_table_is_refused(slides, tmp_path):
    with pytest.raises(ValueError, match=r"labels must be a CSV file, got .*nowhere\.csv"):
        load(slides, tmp_path / "nowhere.csv")


def test_a_folder_without_a_table_has_no_labels(slides):
    found = load_unlabelled(slides)
    assert found.labels == (UNLABELLED,) * 12
    assert found[3].name == "slide_03"
