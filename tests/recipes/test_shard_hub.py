import io
import json
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

import recipes.shard_hub
from recipes.shard_hub import HubSource
from recipes.shards import ShardEvalLoader, ShardLoader
from tests.recipes.shard_runs import collate, names, sample_names, take

SIZES = (5, 3, 6)


def png(value):
    file = io.BytesIO()
    Image.new("RGB", (2, 3), (value, 0, 0)).save(file, "png")
    return file.getvalue()


@pytest.fixture(autouse=True)
def no_progress_bars():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    """Files of pictures with names."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = {"image": datasets.Image(), "txt": datasets.Value("string")}
    for shard, size in enumerate(SIZES):
        columns = {
            "image": [{"bytes": png(10 * shard + row), "path": None} for row in range(size)],
            "txt": [f"{shard}-{row}" for row in range(size)],
        }
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        table.to_parquet(str(tmp_path / f"{shard}.parquet"))
    return tmp_path


@pytest.fixture
def jsonl(tmp_path):
    for shard, size in enumerate(SIZES):
        lines = [json.dumps({"txt": f"{shard}-{row}"}) for row in range(size)]
        (tmp_path / f"{shard}.jsonl").write_text("\n".join(lines))
    return tmp_path


def source(folder, kind):
    suffix = "jsonl" if kind == "json" else kind
    return HubSource(kind, data_files=[str(folder / f"{i}.{suffix}") for i in range(len(SIZES))])


def decode(sample):
    return {"name": sample["txt"]}


def train(folder, kind="parquet", **options):
    defaults = {"batch_size": 2, "shuffle": 3, "collate": collate}
    return ShardLoader(source(folder, kind), decode, **(defaults | options))


def test_columns_are_the_parts_and_images_come_undecoded(parquet):
    rows = list(source(parquet, "parquet").rows(1, start=1))
    assert [row["txt"] for row in rows] == ["1-1", "1-2"]
    assert [row["image"] for row in rows] == [png(11), png(12)]
    assert [row["__key__"] for row in rows] == ["1", "2"]
    # A log says which file.
    assert rows[0]["__url__"] == str(parquet / "1.parquet")
    assert np.asarray(Image.open(io.BytesIO(rows[0]["image"])))[0, 0, 0] == 11


def test_shards_have_numbers_where_nobody_tells_their_files(parquet, monkeypatch):
    monkeypatch.setattr(recipes.shard_hub, "_files", lambda data: [])
    assert source(parquet, "parquet").shards[1] == "parquet train shard 1"
    monkeypatch.undo()
    data = SimpleNamespace(num_shards=2, _ex_iterable=SimpleNamespace(kwargs={"files": ["a"]}))
    assert recipes.shard_hub._files(data) == []
    assert recipes.shard_hub._files(SimpleNamespace(num_shards=1)) == []


def test_images_and_sounds_in_files_of_their_own_are_read(tmp_path):
    (tmp_path / "a.png").write_bytes(png(7))
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    features = datasets.Features(
        image=datasets.Image(), audio=datasets.Audio(), txt=datasets.Value("string")
    )
    columns = {
        "image": [{"bytes": None, "path": str(tmp_path / "a.png")}] * 2,
        "audio": [{"bytes": None, "path": str(tmp_path / f"{name}.wav")} for name in "ab"],
        "txt": [None, "x"],
    }
    table = pyarrow.table(columns, schema=features.arrow_schema)
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    first, second = HubSource("parquet", data_files=str(tmp_path / "x.parquet")).rows(0)
    assert (first["image"], first["audio"]) == (png(7), b"RIFF")
    with pytest.raises(ValueError, match="it has no 'txt', only image, audio"):
        first["txt"]
    assert second.key == "1"
    assert "b.wav" in second.reason


@pytest.mark.parametrize("kind", ["parquet", "json"])
def test_each_epoch_has_every_row_and_a_position_is_resumed(kind, request):
    folder = request.getfixturevalue("jsonl" if kind == "json" else kind)
    whole = take(train(folder, kind), 21)
    assert sorted(sample_names(whole)) == sorted(3 * names(SIZES))
    for taken in (1, 5, 12):
        loader = train(folder, kind)
        take(loader, taken)
        resumed = train(folder, kind)
        resumed.load_state_dict(loader.state_dict())
        assert take(resumed, 21 - taken) == whole[taken:]


def test_the_number_of_workers_changes_nothing(parquet):
    expected = take(train(parquet, num_streams=2), 8)
    assert take(train(parquet, num_streams=2, num_workers=2), 8) == expected


def test_evaluation_has_every_row_once(parquet):
    loader = ShardEvalLoader(
        source(parquet, "parquet"), decode, filler={"name": ""}, collate=collate, batch_size=4
    )
    assert [name for batch in loader for name in batch["names"]] == names(SIZES)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("parquet", "ArrowInvalid: .*arquet"), ("json", "ArrowInvalid: JSON parse")],
)
def test_a_damaged_file_is_a_shard_that_cannot_be_read(kind, reason, request, caplog):
    folder = request.getfixturevalue("jsonl" if kind == "json" else kind)
    found = source(folder, kind)
    path = folder / f"1.{'jsonl' if kind == 'json' else kind}"
    path.write_bytes(path.read_bytes()[:25])
    with pytest.raises(OSError, match=reason):
        list(found.rows(1))
    assert found.num_rows(1) == len(list(_readable(found, 1))) + 1
    caplog.clear()
    loader = ShardLoader(found, decode, collate=collate, batch_size=1, shuffle=0, on_error="skip")
    batches = take(loader, 11)
    assert {name[0] for name in sample_names(batches)} == {"0", "2"}
    assert batches[5][-1] == 1
    own = [r.message for r in caplog.records if r.name.startswith("recipes")]
    assert len(own) == 1
    assert own[0].startswith(f"skipped: {path}, from its sample number 0 on: Arrow")


def _readable(found, shard):
    try:
        yield from found.rows(shard)
    except OSError:
        return


def test_a_dataset_that_cannot_be_opened_is_refused(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(
        ValueError, match="the dataset 'parquet' cannot be opened: ArrowInvalid: Par"
    ):
        HubSource("parquet", data_files=str(tmp_path / "x.parquet"))
