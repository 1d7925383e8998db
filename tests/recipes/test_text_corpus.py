import json
import socket
import sys

import pyarrow
import pyarrow.parquet
import pytest

from recipes.text_corpus import Corpus, read_documents, split_of
from recipes.text_files import find_files
from recipes.text_tables import read_rows


def _write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(folder)


def _rows(*records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def _read(source, **options):
    return [(d.key, d.text) for d in read_documents(find_files(source), **options)]


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError(f"tried to reach the network: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def tables(tmp_path):
    records = [{"text": f"row {i}", "id": i} for i in range(5)]
    records[2]["text"], records[3]["text"] = None, ""
    _write(tmp_path, {"a.jsonl": _rows(*records)})
    pyarrow.parquet.write_table(
        pyarrow.table({"id": [7, 8], "body": ["x", "é"]}), tmp_path / "b.parquet"
    )
    return tmp_path


def test_files_are_documents_read_as_bytes(tmp_path):
    source = _write(tmp_path, {"b.txt": b"\xff\x00", "a/c.py": b"x = 1", "empty.txt": b""})
    assert _read(source) == [("a/c.py", b"x = 1"), ("b.txt", b"\xff\x00")]


def test_rows_are_documents_read_offline(tables, no_network):
    skipped = []
    assert _read(str(tables / "a.jsonl"), on_skip=skipped.append) == [
        ("a.jsonl#0", b"row 0"),
        ("a.jsonl#1", b"row 1"),
        ("a.jsonl#4", b"row 4"),
    ]
    assert skipped == ["a.jsonl#2"]
    assert _read(str(tables / "b.parquet"), column="body") == [
        ("b.parquet#0", b"x"),
        ("b.parquet#1", "é".encode()),
    ]


def test_reading_starts_at_a_file_and_a_row(tables):
    _write(tables, {"c.txt": b"file"})
    files = find_files([str(tables / "c.txt"), str(tables / "a.jsonl"), str(tables / "c.txt")])
    documents = list(read_documents(files, start=(1, 1)))
    assert [(d.file_index, d.row, d.text) for d in documents] == [
        (1, 1, b"row 1"),
        (1, 4, b"row 4"),
        (2, 0, b"file"),
    ]


def test_no_cache_is_left_behind(tables, tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("tempfile.tempdir", str(cache))
    assert len(list(read_rows(tables / "a.jsonl", "text"))) == 5
    assert not list(cache.iterdir())


def test_an_empty_table_holds_no_rows(tmp_path):
    _write(tmp_path, {"a.jsonl": b""})
    assert list(read_rows(tmp_path / "a.jsonl", "text")) == []


@pytest.mark.parametrize("on_error", ["skip", "raise"])
def test_a_missing_column_is_an_error_that_lists_those_there_are(tables, on_error):
    with pytest.raises(ValueError, match=r"column='content' .*a.jsonl, which has \['id', 'text'"):
        _read(str(tables / "a.jsonl"), column="content", on_error=on_error)
    with pytest.raises(ValueError, match=r"column='text' .*b.parquet, which has \['body', 'id'\]"):
        _read(str(tables / "b.parquet"), on_error=on_error)


def test_a_column_of_numbers_is_an_error(tables):
    with pytest.raises(
        ValueError, match=r"column='id' must hold text, got int in row 0 of .*a.jsonl"
    ):
        _read(str(tables / "a.jsonl"), column="id")


def test_a_missing_package_is_named(tables, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RuntimeError, match=r"b.parquet needs the package datasets. .*pip install"):
        _read(str(tables / "b.parquet"))


@pytest.mark.parametrize("name", ["b.parquet", "b.txt"])
def test_what_cannot_be_read_is_skipped_or_stops(tmp_path, caplog, name):
    source = _write(tmp_path, {"a.txt": b"a", "c.txt": b"c"})
    if name == "b.txt":
        (tmp_path / name).symlink_to(tmp_path / "nowhere")
    else:
        (tmp_path / name).write_bytes(b'{"text": "x"}\nno table')
    skipped = []
    assert _read(source, on_skip=skipped.append) == [("a.txt", b"a"), ("c.txt", b"c")]
    assert skipped == [name]
    assert f"skipped {tmp_path / name}: " in caplog.text
    with pytest.raises(ValueError, match=f"on_error='raise' stops .* got .*{name}: .+ Remove"):
        _read(source, on_error="raise")


def test_one_damaged_row_costs_that_row_only(tmp_path, caplog):
    damaged = (b'{"text": "cut', b"", b"[1]", b'{"id": 4}', b'\xff"')
    rows = [b'{"text": "a"}', *damaged, b'{"text": "z"}']
    source = _write(tmp_path, {"t.jsonl": b"\n".join(rows)})
    skipped = []
    # A blank line is no row.
    assert _read(source, on_skip=skipped.append) == [("t.jsonl#0", b"a"), ("t.jsonl#5", b"z")]
    assert skipped == [f"t.jsonl#{row}" for row in (1, 2, 3, 4)]
    path = tmp_path / "t.jsonl"
    assert f"{path}: 2 rows read, 4 skipped, first row 1: Unterminated string" in caplog.text
    with pytest.raises(ValueError, match=rf"on_error='raise' stops .* got {path}: row 1: Untermin"):
        _read(source, on_error="raise")
    found = read_documents(find_files(source), start=(0, 4))
    assert [(d.row, d.text) for d in found] == [(5, b"z")]


def test_rows_without_text_stop_nothing(tables, caplog):
    path = tables / "a.jsonl"
    assert len(_read(str(path), on_error="raise")) == 3
    # An empty row was read all the same.
    assert f"{path}: 4 rows read, 1 skipped, first row 2: no text" in caplog.text


def test_a_damaged_summary_counts_rows(tmp_path):
    source = _write(tmp_path, {"t.jsonl": b'{"text": "a"}\n{"te\n{"text": "b"}'})
    corpus = Corpus(source=source, val_fraction=0, test_fraction=0)
    assert [document.text for _, document in corpus.documents()] == [b"a", b"b"]
    assert corpus.summary.num_skipped == 1


def test_a_parquet_file_cut_off_is_skipped_and_the_next_is_read(tables, caplog):
    whole = (tables / "b.parquet").read_bytes()
    (tables / "b.parquet").write_bytes(whole[: len(whole) // 2])
    _write(tables, {"c.txt": b"c", "d.parquet": b""})
    assert _read(str(tables))[-1] == ("c.txt", b"c")
    assert f"skipped {tables / 'b.parquet'}: " in caplog.text


def test_a_column_may_be_missing_in_rows_but_not_in_all(tmp_path):
    sparse = _write(tmp_path / "one", {"t.jsonl": _rows({"id": 1}, {"text": "x"})})
    assert _read(sparse) == [("t.jsonl#1", b"x")]
    wrong = _write(tmp_path / "two", {"t.jsonl": _rows(*[{"id": i} for i in range(200)])})
    skipped = []
    with pytest.raises(ValueError, match=r"column='text' must be a column of .*has \['id'\]"):
        _read(wrong, on_skip=skipped.append)
    # Not all of a large file is read to find out.
    assert len(skipped) < 100


def test_pieces_of_a_file_share_its_key(tmp_path):
    source = _write(tmp_path, {"a.txt": b"a\n" * 10, "b.txt": b"b"})
    found = list(read_documents(find_files(source), max_document_bytes=8))
    assert [(d.key, d.row, d.text) for d in found] == [
        ("a.txt", 0, b"a\n" * 5),
        ("a.txt", 1, b"a\n" * 4),
        ("a.txt", 2, b"a\n"),
        ("b.txt", 0, b"b"),
    ]


def test_the_split_is_a_function_of_the_key_alone():
    keys = [f"stdlib/module_{i}.py" for i in range(4000)]
    splits = [split_of(key, val_fraction=0.1, test_fraction=0.05) for key in keys]
    assert splits.count("val") == pytest.approx(400, abs=60)
    assert splits.count("test") == pytest.approx(200, abs=45)
    # As drawn once: another hash would let a run validate on what an older one trained on.
    assert splits[:5] == ["train"] * 5
    assert (splits[6], splits[9], splits[24]) == ("test", "test", "val")
    for key, split in zip(keys, splits, strict=True):
        more_val = split_of(key, val_fraction=0.3, test_fraction=0.05)
        assert (more_val == "test") == (split == "test")
        if split == "val":
            assert more_val == "val"
    assert {split_of(key, val_fraction=0, test_fraction=0) for key in keys} == {"train"}


def test_splits_share_no_document_and_leave_none_out(tmp_path):
    files = {f"{i:03}.py": f"x = {i}".encode() for i in range(300)}
    corpus = Corpus(source=_write(tmp_path, files))
    found = [(document.key, split) for split, document in corpus.documents()]
    assert sorted(key for key, _ in found) == sorted(files)
    assert {split for _, split in found} == {"train", "val", "test"}
    summary = corpus.summary
    assert sum(summary.num_documents.values()) == 300
    assert sum(summary.num_bytes.values()) == sum(map(len, files.values()))
    for split in ("train", "val", "test"):
        assert summary.num_documents[split] == [s for _, s in found].count(split)
        assert [d.key for d in corpus.split_documents(split)] == [k for k, s in found if s == split]


def test_equal_content_is_read_once(tmp_path):
    source = _write(tmp_path, {"a.py": b"same", "b/c.py": b"same", "d.py": b"other"})
    corpus = Corpus(source=source)
    assert [document.key for _, document in corpus.documents()] == ["a.py", "d.py"]
    assert corpus.summary.num_duplicates == 1


def test_held_out_sources_are_left_out_of_the_training_text(tmp_path):
    source = _write(tmp_path / "all", {"a.py": b"a", "b.py": b"b", "c.py": b"c"})
    held_out = _write(tmp_path / "val", {"x.py": b"b"})
    test = _write(tmp_path / "test", {"y.py": b"y"})
    corpus = Corpus(source=source, val_source=held_out, test_source=test)
    splits = {document.text: split for split, document in corpus.documents()}
    assert splits == {b"a": "train", b"b": "val", b"c": "train", b"y": "test"}
    assert corpus.summary.num_duplicates == 1
    assert [d.text for d in corpus.split_documents("val")] == [b"b"]


def test_the_fingerprint_follows_content_names_and_splits_only(tmp_path):
    def fingerprint(folder, files, **options):
        corpus = Corpus(source=_write(tmp_path / folder, files), **options)
        list(corpus.documents())
        return corpus.summary.fingerprint

    files = {f"{i}.py": f"x = {i}".encode() for i in range(40)}
    first = fingerprint("one", files)
    assert first == fingerprint("moved", files)
    assert len(first) == 12
    assert first != fingerprint("two", files | {"0.py": b"x = -1"})
    assert first != fingerprint("one", files, val_fraction=0.3)


def test_the_file_fingerprint_follows_names_and_sizes(tmp_path):
    def fingerprint(content, **options):
        source = _write(tmp_path, {"a.txt": content})
        return Corpus(source=source, **options).file_fingerprint()

    first = fingerprint(b"ab")
    assert first == fingerprint(b"cd")
    assert first != fingerprint(b"abc")
    assert first != fingerprint(b"cd", val_fraction=0.2)
    (tmp_path / "b.txt").symlink_to(tmp_path / "nowhere")
    assert first != fingerprint(b"cd")


def test_the_summary_says_what_was_read(tmp_path):
    source = _write(tmp_path, {"a.py": b"a" * 20_000, "b.py": b"a" * 20_000})
    (tmp_path / "c.py").symlink_to(tmp_path / "nowhere")
    corpus = Corpus(source=source, val_fraction=0, test_fraction=0)
    with pytest.raises(RuntimeError, match=r"summary needs all documents to have been read"):
        _ = corpus.summary
    list(corpus.documents())
    text = str(corpus.summary)
    assert "train 1 documents 0.02 MB" in text
    assert "1 duplicates dropped, 1 unreadable" in text


def test_nothing_to_read_is_an_error(tmp_path):
    source = _write(tmp_path, {"a.py": b""})
    (tmp_path / "b.py").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"got 2 files, of which 1 could .* empty: b.py. Check"):
        list(Corpus(source=source).documents())


def test_a_pattern_no_source_uses_is_an_error():
    with pytest.raises(ValueError, match=r"got pattern='\*.c' and no folder among \['stdlib'\]"):
        Corpus(source="stdlib", pattern="*.c")
