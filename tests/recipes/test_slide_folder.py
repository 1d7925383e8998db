import logging

import pytest
from safetensors.torch import save_file

import longnet_zoo as lz
from recipes.classification import UNLABELLED
from recipes.slide_folder import load_folder, load_unlabelled
from tests.recipes.slide_runs import (
    CLASSES,
    DIM,
    draw_slide,
    tiny_encoder,
    write_labels,
    write_slides,
)


@pytest.fixture
def slides(tmp_path):
    return write_slides(tmp_path / "slides")


def load(slides, labels, **options):
    fractions = {"val_fraction": 0.25, "test_fraction": 0.25, "on_error": "raise"}
    return load_folder(slides, labels=labels, **{**fractions, **options})


def names(found):
    return [found[i].name for i in range(len(found.labels))]


def test_the_tables_splits_and_classes_are_taken(slides, tmp_path):
    classes, found = load(slides, write_labels(tmp_path / "labels.csv"))
    assert (classes, found["train"].input_dim) == (CLASSES, DIM)
    assert names(found["train"]) == [f"slide_{i:02d}" for i in range(6)]
    assert names(found["val"]) == ["slide_06", "slide_07", "slide_08"]
    assert found["train"].labels == (0, 1, 0, 1, 0, 1)
    slide = found["test"][1]
    assert (slide.name, slide.label, slide.tiles.shape) == ("slide_10", 0, (9, DIM))


def test_without_splits_a_hash_of_the_slide_decides(slides, tmp_path):
    table = write_labels(tmp_path / "labels.csv", split=None)
    split_of = {}
    for _ in range(2):
        _, found = load(slides, table)
        split_of = {name: split for split in found for name in names(found[split])}
        assert len(split_of) == 12
    # A slide stays where it is when others come and go.
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0], *lines[4:]]))
    _, found = load(slides, table)
    assert {name: split for split in found for name in names(found[split])}.items() < (
        split_of.items()
    )
    assert len(set(split_of.values())) > 1


def test_slides_of_a_patient_are_in_one_split(slides, tmp_path):
    patients = [f"patient {i // 4}" for i in range(12)]
    table = write_labels(tmp_path / "labels.csv", split=None, patient_id=patients)
    _, found = load(slides, table)
    splits = [{int(name[-2:]) // 4 for name in names(found[split])} for split in found]
    assert sum(map(len, splits)) == 3


def test_nothing_held_out_is_possible(slides, tmp_path):
    table = write_labels(tmp_path / "labels.csv", split=None)
    _, found = load(slides, table, val_fraction=0, test_fraction=0)
    assert len(found["train"].labels) == 12
    assert not found["val"].labels


def test_slides_that_cannot_be_used_stop_or_are_logged(slides, tmp_path, caplog):
    table = write_labels(tmp_path / "labels.csv")
    (slides / "slide_03.safetensors").unlink()
    (slides / "slide_07.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"2 of 12 .*: slide_03 is not in .*slide_07.*damaged"):
        load(slides, table)
    with caplog.at_level(logging.WARNING):
        _, found = load(slides, table, on_error="skip")
    assert "skipped 2 of 12 labelled slides: slide_03 is not in" in caplog.text
    assert [len(found[split].labels) for split in found] == [5, 2, 3]


def test_skipping_all_slides_is_an_error(slides, tmp_path):
    for path in slides.iterdir():
        path.write_bytes(b"short")
    with pytest.raises(ValueError, match=r"12 of 12 labelled slides cannot be used.*and 7 more\.$"):
        load(slides, write_labels(tmp_path / "labels.csv"), on_error="skip")


def test_slides_without_a_label_are_named(slides, tmp_path, caplog):
    table = write_labels(tmp_path / "labels.csv")
    table.write_text("\n".join(table.read_text().splitlines()[:-2]))
    load(slides, table)
    assert "left out, for want of a label: slide_10, slide_11" in caplog.text


def test_embeddings_of_another_size_are_no_use(slides, tmp_path, caplog):
    write_slides(slides, count=1, dim=9)
    table = write_labels(tmp_path / "labels.csv")
    message = r"slide_00\.safetensors has embeddings of 9 channels, most slides have 5"
    with pytest.raises(ValueError, match=message):
        load(slides, table)
    _, found = load(slides, table, on_error="skip")
    assert "slide_00" not in names(found["train"])
    assert "1 of 12 labelled slides" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda coords: coords / 4096, r"not normalised to \[0, 1\], got .* at tile "),
        (lambda coords: coords / 4, r"tile_size=256 apart, got tiles 0 at .* in one cell"),
        (lambda coords: coords - 300.0, r"coords must be 0 or more, got \(-300"),
        (lambda coords: coords * 1000.0, r"coords must be below grid_size \* tile_size"),
        (lambda coords: coords * float("nan"), r"coords must be finite"),
    ],
)
def test_coordinates_that_the_encoder_refuses_are_no_use(slides, tmp_path, change, message):
    encoder = lz.create_model("gigapath_slide_enc12l768d", **tiny_encoder()).config
    table = write_labels(tmp_path / "labels.csv")
    tiles, coords = draw_slide(8, num_tiles=7)
    save_file({"features": tiles, "coords": change(coords)}, slides / "slide_08.safetensors")
    with pytest.raises(ValueError, match=rf"slide_08\.safetensors: .*{message}") as error:
        load(slides, table, encoder=encoder)
    # It is named by its file, not by its place in a batch.
    assert "slide 0" not in str(error.value)
    _, found = load(slides, table, on_error="skip", encoder=encoder)
    assert names(found["val"]) == ["slide_06", "slide_07"]
    found = load_unlabelled(slides, on_error="skip", encoder=encoder)
    assert names(found) == [f"slide_{i:02d}" for i in range(12) if i != 8]


def test_slides_to_predict_must_have_the_encoders_size(slides):
    write_slides(slides, count=2, dim=9)
    encoder = lz.create_model("gigapath_slide_enc12l768d", **tiny_encoder(input_dim=9)).config
    with pytest.raises(ValueError, match=r"10 of 12 slides .* 5 channels, the encoder reads 9"):
        load_unlabelled(slides, on_error="raise", encoder=encoder)
    found = load_unlabelled(slides, on_error="skip", encoder=encoder)
    assert names(found) == ["slide_00", "slide_01"]
    assert found.input_dim == 9


def test_the_class_of_a_skipped_slide_remains_one(slides, tmp_path):
    table = write_labels(tmp_path / "labels.csv")
    table.write_text(table.read_text().replace("slide_11,right", "slide_11,other"))
    (slides / "slide_11.safetensors").unlink()
    with pytest.raises(ValueError, match=r"training split, got none for \['other'\]"):
        load(slides, table, on_error="skip")


def test_a_patient_in_two_splits_is_refused(slides, tmp_path):
    patients = ["p0"] * 6 + ["p1"] * 3 + ["p0", "", ""]
    table = write_labels(tmp_path / "labels.csv", patient_id=patients)
    with pytest.raises(ValueError, match=r"in one split, got 'p0' in test and train\. Move them"):
        load(slides, table)
    # Without a name nobody knows.
    patients = ["p0"] * 3 + [""] * 9
    assert load(slides, write_labels(tmp_path / "labels.csv", patient_id=patients))


def test_blanks_and_suffixes_in_the_table_do_not_matter(slides, tmp_path):
    table = tmp_path / "labels.csv"
    rows = ["slide_00.safetensors,left ,train", " slide_01 , left,train", "slide_02,right,train"]
    table.write_text("\n".join(["slide_id, label,split", *rows]))
    classes, found = load(slides, table)
    assert classes == CLASSES
    assert names(found["train"]) == ["slide_00", "slide_01", "slide_02"]
    table.write_text(table.read_text() + "\nslide_00,left,train")
    with pytest.raises(ValueError, match=r"line 5: a slide has one line, got 'slide_00' again"):
        load(slides, table)


def test_a_table_in_another_encoding_is_refused(slides, tmp_path):
    table = write_labels(tmp_path / "labels.csv")
    table.write_bytes(table.read_text().replace("left", "l\xe4ngs").encode("latin-1"))
    with pytest.raises(ValueError, match=r"labels\.csv must be a CSV file in UTF-8, .* byte 0xe4"):
        load(slides, table)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide,label\na,b", r"columns slide_id and label, got \['slide', 'label'\]"),
        ("slide_id;label\na;b", r"got \['slide_id;label'\].* with commas between"),
        ("slide_id,label\n", r"labels\.csv must have a line for each slide, got a header only"),
        ("slide_id,label\nslide_00,x\nslide_01,x", r"two or more classes, got only 'x' in"),
        ("slide_id,label\nslide_00", r"line 2: .*not be empty, got 'slide_00' and ''"),
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
    found = load_unlabelled(slides, on_error="raise")
    assert found.labels == (UNLABELLED,) * 12
    assert found[3].name == "slide_03"
