import csv
import itertools
import json
import logging
import re
import tarfile

import datasets
import pytest

from recipes.shard_files import TarSource
from recipes.shard_hub import HubSource
from recipes.shard_writer import ShardWriter, main, write_shards


def rows(folder, split="train"):
    source = TarSource(f"{folder}/{split}-*.tar")
    return [
        {key: value for key, value in row.items() if key != "__url__"}
        for shard in range(len(source.shards))
        for row in source.rows(shard)
    ]


@pytest.fixture
def photos(tmp_path):
    for name in ("a/1", "a/2", "a/3", "b/1", "b/2"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".jpg").write_bytes(b"picture " + name.encode())
        path.with_suffix(".txt").write_text(f"caption {name}")
    (tmp_path / "photos" / ".DS_Store").write_bytes(b"")
    return tmp_path / "photos"


TABLE = [("a/1.jpg", 'a "cat", asleep'), ("b/2.jpg", "a dog\nawake"), ("a/3.jpg", "")]


def write_table(folder, kind, table=TABLE):
    path = folder / f"table.{kind}"
    columns = ("image", "caption")
    if kind == "jsonl":
        lines = (json.dumps(dict(zip(columns, row, strict=True))) for row in table)
        path.write_text("\n".join(lines))
    elif kind == "parquet":
        datasets.disable_progress_bars()
        data = {name: [row[i] for row in table] for i, name in enumerate(columns)}
        datasets.Dataset.from_dict(data).to_parquet(str(path))
        datasets.enable_progress_bars()
    else:
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if kind == "tsv" else ",")
            writer.writerows([columns, *table])
    return str(path)


def test_a_folder_becomes_shards_of_a_fixed_size(photos, tmp_path):
    out = tmp_path / "out"
    assert write_shards(source=str(photos), folder=str(out), samples_per_shard=2) == {
        "train": (5, 3)
    }
    assert sorted(path.name for path in out.iterdir()) == [
        f"train-00000{shard}.tar" for shard in range(3)
    ]
    found = rows(out)
    assert [row["__key__"] for row in found] != sorted(row["__key__"] for row in found)
    assert sorted(found, key=lambda row: row["__key__"]) == [
        {"__key__": name, "jpg": f"picture {name}".encode(), "txt": f"caption {name}".encode()}
        for name in ("a/1", "a/2", "a/3", "b/1", "b/2")
    ]


def test_the_same_input_gives_the_same_bytes(photos, tmp_path):
    for name in ("one", "two"):
        write_shards(source=str(photos), folder=str(tmp_path / name))
    first, second = (tmp_path / name / "train-000000.tar" for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_a_table_becomes_shards_in_its_order(photos, tmp_path, kind):
    table = write_table(photos, kind)
    columns = {"image": "file", "caption": "txt"}
    write_shards(source=table, folder=str(tmp_path / "out"), columns=columns)
    assert rows(tmp_path / "out") == [
        {
            "__key__": f"{row:09}",
            "jpg": (photos / name).read_bytes(),
            "txt": caption.encode(),
        }
        for row, (name, caption) in enumerate(TABLE)
    ]


def test_splits_share_out_the_samples_and_keep_a_picture_together(photos, tmp_path):
    table = write_table(photos, "csv", [(name, str(i)) for name, _ in TABLE for i in range(20)])
    out = tmp_path / "out"
    fractions = {"val_fraction": 0.3, "test_fraction": 0.3}
    columns = {"image": "file", "caption": "cls"}
    counts = write_shards(source=table, folder=str(out), columns=columns, **fractions)
    assert sum(number for number, _ in counts.values()) == 60
    assert set(counts) == {"train", "val", "test"}
    assert all(number % 20 == 0 for number, _ in counts.values())
    by_row = write_shards(
        source=table, folder=str(tmp_path / "rows"), columns={"caption": "cls"}, **fractions
    )
    assert all(number for number, _ in by_row.values())
    assert len(rows(tmp_path / "rows", "val")) == by_row["val"][0]


def test_damaged_rows_are_logged_and_counted(photos, tmp_path, caplog):
    table = tmp_path / "photos" / "table.jsonl"
    lines = [
        '{"image": "a/1.jpg", "caption": "x"}',
        '{"image": "missing.jpg", "caption": "x"}',
        "{broken",
        '{"image": "a/2.jpg", "caption": null}',
        "[1]",
        '{"image": "a/2.jpg", "caption": 7}',
    ]
    table.write_text("\n".join(lines))
    options = {"source": str(table), "columns": {"image": "file", "caption": "txt"}}
    with caplog.at_level(logging.WARNING):
        assert write_shards(**options, folder=str(tmp_path / "out")) == {"train": (2, 1)}
    assert [row["txt"] for row in rows(tmp_path / "out")] == [b"x", b"7"]
    messages = [record.message for record in caplog.records]
    for message, expected in zip(
        messages,
        [
            "sample 000000001: .*missing.jpg",
            "sample 000000002: Expecting",
            "sample 000000003: its column 'caption' holds nothing",
            r"sample 000000004: a row must be an object: \[1\]",
            "skipped 4 of 6 samples",
        ],
        strict=True,
    ):
        assert re.search(expected, message)
    with pytest.raises(ValueError, match=r"sample 000000001: .*missing.jpg.*--on_error skip"):
        write_shards(**options, folder=str(tmp_path / "stop"), on_error="raise")
    # Nothing half written is left.
    assert not list((tmp_path / "stop").iterdir())


def test_two_columns_of_a_kind_are_refused(photos, tmp_path):
    table = write_table(photos, "csv")
    options = {"columns": {"image": "file", "caption": "jpg"}, "on_error": "raise"}
    with pytest.raises(ValueError, match="two of its columns become 'jpg'"):
        write_shards(source=table, folder=str(tmp_path / "out"), **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"source": "nowhere"}, "an existing table .*, got 'nowhere'"),
        ({"source": "TABLE"}, "a table needs columns, got None and '.*table.csv'"),
        (
            {"source": "TABLE", "columns": {"picture": "file"}},
            "those of the table, got picture and .*table.csv with image, caption",
        ),
        ({"columns": {"image": "file"}}, "columns is for tables, got {'image': 'file'} and the f"),
        ({"samples_per_shard": 0}, "samples_per_shard must be 1 or more, got 0"),
        (
            {"val_fraction": 0.6, "test_fraction": 0.4},
            "leave something for training, got 0.6 and 0",
        ),
        ({"val_fraction": -0.1}, "must be 0 or more .* got -0.1 and 0.0"),
    ],
)
def test_wrong_options_are_refused(photos, tmp_path, options, match):
    table = write_table(photos, "csv")
    options = {"source": str(photos), "folder": str(tmp_path / "out"), **options}
    options["source"] = table if options["source"] == "TABLE" else options["source"]
    with pytest.raises(ValueError, match=match):
        write_shards(**options)


def test_a_table_that_is_not_utf8_or_holds_nothing_is_refused(tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes("image,caption\nx,é".encode("latin-1"))
    options = {"source": str(path), "folder": str(tmp_path / "out"), "columns": {"caption": "txt"}}
    with pytest.raises(
        ValueError, match=r"a .csv table must be readable as UTF-8, got .*table.csv"
    ):
        write_shards(**options)
    path.write_text("image,caption\n")
    with pytest.raises(ValueError, match=r"must hold samples, got '.*table.csv' with none"):
        write_shards(**options)


def test_damaged_parquet_is_said(photos, tmp_path, caplog, monkeypatch):
    path = write_table(photos, "parquet")

    def rows_until_damage(self, shard):
        yield from itertools.islice(read(self, shard), 2)
        raise OSError("page 3")

    read = HubSource.rows
    monkeypatch.setattr(HubSource, "rows", rows_until_damage)
    options = {"source": path, "folder": str(tmp_path / "out"), "columns": {"caption": "txt"}}
    assert write_shards(**options) == {"train": (2, 1)}
    assert "sample 000000002: the table cannot be read any further: page 3" in caplog.text


def test_shards_appear_when_they_are_complete(tmp_path):
    with ShardWriter(tmp_path, samples_per_shard=2) as writer:
        writer.write("1", {"txt": b"a"})
        assert not list(tmp_path.glob("*.tar"))
        writer.write("2", {"txt": b"b"})
        assert [path.name for path in tmp_path.glob("*.tar")] == ["train-000000.tar"]
    assert (writer.num_samples, writer.num_shards) == (2, 1)
    with tarfile.open(tmp_path / "train-000000.tar") as archive:
        assert archive.getnames() == ["1.txt", "2.txt"]


@pytest.mark.parametrize(("key", "parts"), [("a/b.c", {"txt": b""}), ("a", {})])
def test_wrong_samples_are_refused(tmp_path, key, parts):
    with (
        ShardWriter(tmp_path) as writer,
        pytest.raises(ValueError, match=f"got '{key}' with {len(parts)} contents"),
    ):
        writer.write(key, parts)


def test_older_shards_are_not_mixed_with_new_ones(photos, tmp_path, capsys):
    arguments = ["--source", str(photos), "--folder", str(tmp_path / "out")]
    main(arguments)
    assert capsys.readouterr().out == "train: 5 samples in 1 shards\n"
    with pytest.raises(SystemExit):
        main(arguments)
    assert "got 1 in" in capsys.readouterr().err
