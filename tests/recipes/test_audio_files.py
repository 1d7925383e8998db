import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import soundfile

from recipes.audio_files import SAMPLES, Event, find_audio, load_recordings
from tests.recipes.audio_runs import write_tones


def load(source, **options):
    defaults = {
        "val_source": None,
        "test_source": None,
        "val_fraction": 0.2,
        "test_fraction": 0.2,
        "num_families": 8,
        "class_names": None,
    }
    return load_recordings(str(source), **(defaults | options))


def write_csv(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return path


def test_samples_are_165_recordings_at_16_khz_below_two_megabytes():
    paths = sorted(SAMPLES.glob("*.ogg"))
    infos = [soundfile.info(path) for path in paths]
    assert len(paths) == 165
    assert {(info.samplerate, info.channels) for info in infos} == {(16000, 1)}
    assert 323 < sum(info.duration for info in infos) < 325
    assert sum(path.stat().st_size for path in SAMPLES.iterdir()) < 2e6
    sources = (SAMPLES / "SOURCES.md").read_text()
    for path in paths:
        # Numbers are set off in some of the names there.
        name = re.sub(r"(?<=[a-z])(\d+)$", r"_?\1", path.stem).replace("3d_", "3d_?")
        assert re.search(f":{name}`", sources), path.name


def test_samples_are_split_in_each_family():
    classes, splits = load("samples", val_fraction=0.1, test_fraction=0.25)
    assert classes == ("ambi", "bd", "drum", "elec", "loop", "mehackit", "perc", "tabla")
    names = [{r.path for r in own} for own in splits.values()]
    assert [len(own) for own in names] == [88, 13, 32]
    assert len(set.union(*names)) == 133
    for own in splits.values():
        assert set(Counter(r.label for r in own)) == set(classes)
        assert all(Path(r.path).name.startswith(f"{r.label}_") for r in own)
    # The split must not change from one version to the next.
    test = " ".join(sorted(r.key for r in splits["test"]))
    assert hashlib.sha256(test.encode()).hexdigest()[:8] == "03f45175"
    assert load("samples", num_families=3)[0] == ("drum", "elec", "tabla")
    with pytest.raises(ValueError, match=r"num_families must be in \[2, 14\], got 15"):
        load("samples", num_families=15)


def test_folder_of_classes_is_split_by_hash(tmp_path):
    write_tones(tmp_path, per_class=20)
    (tmp_path / "high" / "notes.txt").write_text("no sound")
    (tmp_path / ".cache").mkdir()
    classes, splits = load(tmp_path)
    assert classes == ("high", "low", "middle")
    assert sum(map(len, splits.values())) == 60
    assert all(r.path == str(tmp_path / r.label / Path(r.path).name) for r in splits["val"])
    (tmp_path / "high" / "zz.wav").write_bytes((tmp_path / "high" / "00.wav").read_bytes())
    for name in ("val", "test"):
        assert {r.key for r in splits[name]} <= {r.key for r in load(tmp_path)[1][name]}


def test_folders_of_splits_are_kept(tmp_path):
    write_tones(tmp_path / "train", per_class=10)
    write_tones(tmp_path / "test", per_class=2)
    _, splits = load(tmp_path)
    assert len(splits["test"]) == 6
    assert 0 < len(splits["val"]) < 20
    assert len(splits["val"]) + len(splits["train"]) == 30
    write_tones(tmp_path / "val", per_class=1)
    assert [len(own) for own in load(tmp_path)[1].values()] == [30, 3, 6]
    (tmp_path / "val" / "high").rename(tmp_path / "val" / "shrill")
    with pytest.raises(ValueError, match="got shrill among those of val and the classes high, low"):
        load(tmp_path)


def test_other_sources_are_held_out_whole(tmp_path):
    write_tones(tmp_path / "a", per_class=4)
    write_tones(tmp_path / "b", per_class=3)
    _, splits = load(tmp_path / "a", val_source=str(tmp_path / "b"), test_fraction=0.0)
    assert [len(own) for own in splits.values()] == [12, 9, 0]


def test_table_of_labels_of_parts(tmp_path):
    table = write_csv(
        tmp_path / "t.csv",
        "path,label,start,end,split,note",
        "a.wav,dog,0,1.5,train,x",
        "a.wav,cat,1.5,,train,",
        "sub/b.wav,dog,,,val,",
    )
    classes, splits = load(table)
    assert classes == ("cat", "dog")
    first, second = splits["train"]
    assert (first.label, first.start, first.end) == ("dog", 0.0, 1.5)
    assert (second.label, second.start, second.end) == ("cat", 1.5, None)
    assert splits["val"][0].path == str(tmp_path / "sub/b.wav")
    # Parts of a file stay together.
    lines = [f"{i // 4}.wav,{'xy'[i % 2]},{i % 4},{i % 4 + 1}" for i in range(80)]
    _, splits = load(write_csv(tmp_path / "t.csv", "path,label,start,end", *lines))
    keys = [{r.key for r in own} for own in splits.values()]
    assert all(keys)
    assert sum(map(len, keys)) == 20


def test_table_of_events(tmp_path):
    rows = [
        {"path": "a.wav", "tag": "dog", "start": 1, "end": 2},
        {"path": "a.wav", "tag": "cat", "start": 0.5, "end": 3},
        {"path": "b.wav", "tag": ""},
    ]
    table = tmp_path / "t.jsonl"
    table.write_text("\n".join(json.dumps(row) for row in rows))
    classes, splits = load(table, val_fraction=0.0, test_fraction=0.0)
    assert classes == ("cat", "dog")
    a, b = splits["train"]
    assert a.events == (
        Event(tag="dog", start=1.0, end=2.0),
        Event(tag="cat", start=0.5, end=3.0),
    )
    assert b.events == ()


def test_table_of_transcripts_has_no_classes(tmp_path):
    table = write_csv(tmp_path / "t.csv", "path,transcript", "a.wav,hello", "b.wav,")
    classes, splits = load(table, val_fraction=0.0, test_fraction=0.0)
    assert classes == ()
    assert [r.transcript for r in splits["train"]] == ["hello", ""]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["path,label", ",dog"], "path='' and label in line 2"),
        (["path,speaker", "a.wav,x"], "path='a.wav' and none of these in line 2"),
        (["path,label,tag", "a.wav,x,y"], "path='a.wav' and label, tag in line 2"),
        (["path,label", "a.wav,"], "a label must not be empty, got '' in line 2"),
        (["path,label,start", "a.wav,x,soon"], "start must be seconds, 0 or more, got 'soon'"),
        (["path,label,end", "a.wav,x,inf"], "end must be seconds, 0 or more, got 'inf'"),
        (["path,label,start,end", "a.wav,x,2,1"], "start must be before end, got 2.0 and 1.0"),
        (["path,tag,start", "a.wav,x,2"], "must have start and end, got 2.0 and None"),
        (["path,label,split", "a.wav,x,dev"], "split must be train, val or test, got 'dev'"),
        (["path,label,split", "a.wav,x,train", "b.wav,x,"], "got 1 without one"),
        (
            ["path,tag,start,end,split", "a.wav,x,0,1,train", "a.wav,y,0,1,val"],
            "got a.wav in 'train' and 'val'",
        ),
        (["path,label"], "holds no recordings"),
        (["path,label,split", "a.wav,x,val"], "training needs recordings, got none"),
        (["path,label", "a.wav,x"], "got x in .* and none for a second"),
    ],
)
def test_wrong_tables_are_refused(tmp_path, lines, message):
    table = write_csv(tmp_path / "t.csv", *lines)
    with pytest.raises(ValueError, match=message):
        load(table, val_fraction=0.0, test_fraction=0.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "line 1 of .* must be JSON"), ("[1]", r"must be a JSON object, got '\[1\]'")],
)
def test_wrong_lines_of_json_are_refused(tmp_path, text, message):
    table = tmp_path / "t.jsonl"
    table.write_text(text)
    with pytest.raises(ValueError, match=message):
        load(table)


def test_wrong_sources_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"got 'nowhere'. Pass its path as data.source"):
        load("nowhere")
    with pytest.raises(ValueError, match="cannot read the table"):
        load(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="must be an audio file or a folder with some"):
        find_audio(str(tmp_path))
    write_tones(tmp_path, per_class=1)
    assert [r.key for r in find_audio(str(tmp_path))] == ["00.wav"] * 3
    assert find_audio(str(tmp_path / "low/00.wav"))[0].path == str(tmp_path / "low/00.wav")
    with pytest.raises(ValueError, match="and none for siren"):
        load(tmp_path, class_names=["high", "siren"], val_fraction=0.0, test_fraction=0.0)
