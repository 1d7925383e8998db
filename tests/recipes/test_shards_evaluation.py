"""The loader for evaluation, of recipes/shards.py."""

import pytest

from recipes.shard_files import TarSource
from recipes.shards import ShardEvalLoader
from tests.recipes.shard_runs import (
    DAMAGES,
    SIZES,
    collate,
    damaged_shards,
    decode,
    names,
    write_shards,
)

NUM = sum(SIZES)
FILLER = {"name": "", "size": 0}


@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path)
    return tmp_path


@pytest.fixture(params=list(DAMAGES))
def damaged(request, tmp_path):
    return damaged_shards(tmp_path, request.param)


def evaluation(folder, decode=decode, **options):
    defaults = {"batch_size": 3, "collate": collate, "filler": FILLER}
    return ShardEvalLoader(str(folder), decode, **(defaults | options))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("batch_size", "world_size"), [(3, 1), (2, 3), (30, 2)])
def test_evaluation_has_every_sample_once_in_order(folder, batch_size, world_size, workers):
    own = [
        list(
            evaluation(
                folder,
                batch_size=batch_size,
                rank=rank,
                world_size=world_size,
                num_workers=workers,
            )
        )
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in own}) == 1
    found = [
        (name, is_sample)
        for batches in own
        for batch in batches
        for name, is_sample in zip(batch["names"], batch["is_sample"].tolist(), strict=True)
    ]
    assert [name for name, is_sample in found if is_sample] == names()
    missing = -NUM % world_size
    assert [name for name, is_sample in found if not is_sample] == [""] * missing
    assert not any(int(batch["num_skipped"]) for batches in own for batch in batches)


def test_evaluation_is_the_same_every_time(folder):
    loader = evaluation(folder)
    first, second = ([batch["names"] for batch in loader] for _ in range(2))
    assert first == second
    assert len(loader) == len(first) == -(-NUM // 3)


def test_evaluation_reads_a_shard_once(folder, monkeypatch):
    starts = []
    original = TarSource.rows

    def spy(self, shard, *, start=0):
        starts.append((shard, start))
        return original(self, shard, start=start)

    loader = evaluation(folder, batch_size=2)
    monkeypatch.setattr(TarSource, "rows", spy)
    list(loader)
    assert starts == [(shard, 0) for shard in range(4)]


def test_evaluation_can_be_limited(folder):
    found = [name for batch in evaluation(folder, max_samples=7) for name in batch["names"]]
    assert found == names()[:7]
    assert len(evaluation(folder, max_samples=99)) == len(evaluation(folder))


def test_damage_does_not_count_in_evaluation(damaged, caplog):
    urls, decode_it, lost, message = damaged
    loader = ShardEvalLoader(
        urls, decode_it, filler=FILLER, collate=collate, batch_size=30, on_error="skip"
    )
    (batch,) = loader
    assert [name for name in batch["names"] if name] == [n for n in names() if n not in lost]
    assert int(batch["num_skipped"]) == 1 == batch["is_sample"].tolist().count(False)
    (record,) = caplog.records
    assert record.message.startswith("skipped: ")
    with pytest.raises(ValueError, match=f"{message}.*Or pass --data.on_error skip"):
        list(ShardEvalLoader(urls, decode_it, filler=FILLER, collate=collate, batch_size=3))


@pytest.mark.parametrize("change", ["gone", "shorter"])
def test_a_shard_that_changes_during_evaluation_loses_its_samples(folder, caplog, change):
    loader = evaluation(folder, on_error="skip", batch_size=5)
    path = folder / "part2-000000.tar"
    if change == "gone":
        path.unlink()
    else:
        path.write_bytes((folder / "part1-000000.tar").read_bytes())
    batches = list(loader)
    left = [name for batch in batches for name in batch["names"] if name]
    kept = 7 if change == "gone" else 4
    assert len(left) == NUM - kept
    assert sum(int(batch["num_skipped"]) for batch in batches) == kept
    text = {"gone": "No such file", "shorter": "it held more samples when they were counted"}
    # One line for each batch, and not for each sample.
    assert 1 <= caplog.text.count("part2-000000.tar") <= 3
    assert text[change] in caplog.text


def test_evaluation_of_nothing_but_damage_is_an_error(folder):
    for path in folder.glob("*.tar"):
        path.write_bytes(b"<html>")
    with pytest.raises(
        ValueError, match=r"none of the 4 shards holds a sample .* first is .*part0-"
    ):
        evaluation(folder, on_error="skip")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"num_workers": -1}, "num_workers must be 0 or more, got -1"),
        ({"max_samples": 0}, "max_samples must be 1 or more, got 0"),
        ({"on_error": "ignore"}, "on_error must be 'skip' or 'raise', got 'ignore'"),
    ],
)
def test_wrong_options_are_refused(folder, options, match):
    with pytest.raises(ValueError, match=match):
        evaluation(folder, **options)
