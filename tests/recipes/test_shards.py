import itertools
import json
import multiprocessing
import random
import re
import tarfile
from collections import Counter

import pytest
import torch
import torch.distributed as dist

from recipes.shard_files import TarSource
from recipes.shards import ShardLoader
from tests.recipes.shard_runs import (
    DAMAGES,
    SIZES,
    collate,
    damaged_shards,
    decode,
    names,
    sample_names,
    take,
    write_shards,
)

NUM = sum(SIZES)


@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path)
    return tmp_path


def train(folder, decode=decode, **options):
    defaults = {"batch_size": 3, "shuffle": 4, "seed": 5, "batches_per_epoch": 7}
    urls = str(folder) if not isinstance(folder, list) else folder
    return ShardLoader(urls, decode, collate=collate, **(defaults | options))


def test_each_epoch_has_every_sample_once_in_another_order(folder):
    batches = sample_names(take(train(folder, batch_size=1, shuffle=NUM), 3 * NUM))
    epochs = [batches[i * NUM : (i + 1) * NUM] for i in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [sorted(names())] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != names()


def test_the_order_depends_on_the_seed_alone(folder):
    first = take(train(folder), 9)
    assert take(train(folder), 9) == first
    assert take(train(folder, seed=6), 9) != first


def test_without_shuffling_the_order_is_kept(folder):
    loader = train(folder, batch_size=1, shuffle=0)
    assert sample_names(take(loader, 2 * NUM)) == names() * 2


def test_a_buffer_mixes_the_samples_of_a_shard(tmp_path):
    write_shards(tmp_path, (40,))
    found = sample_names(take(train(tmp_path, batch_size=1, shuffle=8), 40))
    assert sorted(found) == sorted(names((40,)))
    places = [int(name.split("-")[1]) for name in found]
    assert places != sorted(places)
    assert all(abs(place - i) < 16 for i, place in enumerate(places))
    # There is one order of one shard, so that this is the seed's part in the mixing.
    other = take(train(tmp_path, batch_size=1, shuffle=8, seed=6), 40)
    assert sample_names(other) != found


def test_shards_come_in_another_order_in_each_epoch(folder):
    found = sample_names(take(train(folder, batch_size=1, shuffle=1), 4 * NUM))
    shards = [name[0] for name in found if name.endswith("-0")]
    epochs = [tuple(shards[i : i + 4]) for i in range(0, 16, 4)]
    assert all(sorted(epoch) == ["0", "1", "2", "3"] for epoch in epochs)
    assert len(set(epochs)) > 1


def test_an_epoch_is_a_number_of_batches_and_the_next_goes_on(folder):
    loader = train(folder, batches_per_epoch=4)
    assert len(loader) == 4
    epochs = [sample_names([(*b["names"], 0) for b in loader]) for _ in range(2)]
    assert epochs[0] + epochs[1] == sample_names(take(train(folder), 8))


@pytest.mark.parametrize(
    ("taken", "workers"), [(0, 0), (1, 0), (2, 0), (6, 0), (13, 0), (24, 0), (1, 2), (13, 2)]
)
def test_a_position_is_resumed(folder, taken, workers):
    options = {"num_workers": workers, "num_streams": 2}
    whole = take(train(folder, **options), 30)
    loader = train(folder, **options)
    take(loader, taken)
    state = loader.state_dict()
    # Taken after the state, so not counted.
    take(loader, 1)
    resumed = train(folder, **options)
    resumed.load_state_dict(state)
    assert take(resumed, 30 - taken) == whole[taken:]
    assert json.loads(json.dumps(state)) == state
    assert len(json.dumps(state)) < 500


def test_the_number_of_workers_changes_nothing(folder):
    expected = take(train(folder, num_streams=4), 12)
    for workers in (1, 2):
        assert take(train(folder, num_streams=4, num_workers=workers), 12) == expected


def ranks(folder, number, world_size=2, **options):
    """Returns the batches of each rank."""
    return [
        take(train(folder, rank=rank, world_size=world_size, **options), number)
        for rank in range(world_size)
    ]


def test_ranks_and_workers_read_shards_of_their_own(folder):
    first, second = ranks(folder, 4, batch_size=1, shuffle=1, num_workers=2)
    shards = [{name.split("-")[0] for name in sample_names(own)} for own in (first, second)]
    # Four readers and four shards.
    assert [len(own) for own in shards] == [2, 2]
    assert not shards[0] & shards[1]


def test_ranks_with_fewer_samples_get_as_many_batches(tmp_path):
    write_shards(tmp_path, (1, 30))
    first, second = ranks(tmp_path, 20)
    assert len(first) == len(second) == 20
    counts = Counter(sample_names(first + second))
    assert set(counts) == set(names((1, 30)))


def test_streams_share_shards_where_there_are_fewer(tmp_path):
    write_shards(tmp_path, (7, 5))
    streams = ranks(tmp_path, 2, world_size=4, batch_size=1, shuffle=1)
    found = [name for own in streams for name in sample_names(own)]
    assert len(set(found)) == 8
    everything = ranks(tmp_path, 30, world_size=4, batch_size=1)
    assert {n for own in everything for n in sample_names(own)} == set(names((7, 5)))


def test_other_ranks_go_on_with_the_same_batches(folder):
    both = ranks(folder, 6, num_streams=4)
    whole = list(itertools.chain.from_iterable(zip(*both, strict=True)))
    alone = train(folder, num_streams=4)
    assert take(alone, 4) == whole[:4]
    resumed = [train(folder, num_streams=4, rank=rank, world_size=2) for rank in (0, 1)]
    for rank, loader in enumerate(resumed):
        loader.load_state_dict(alone.state_dict())
        assert take(loader, 4) == both[rank][2:]


def _rank(rank, folder, store, queue):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    loader = train(folder, rank=rank, world_size=2)
    take(loader, 5)
    state = loader.state_dict()
    queue.put((rank, state, take(loader, 6)))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.distributed
def test_the_state_of_one_rank_holds_the_positions_of_all(folder, tmp_path):
    # As the workers of a DataLoader: quick, since nothing is imported again.
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    arguments = (folder, tmp_path / "store", queue)
    processes = [context.Process(target=_rank, args=(rank, *arguments)) for rank in (0, 1)]
    for process in processes:
        process.start()
    found = {rank: (state, rest) for rank, state, rest in (queue.get(timeout=90) for _ in (0, 1))}
    for process in processes:
        process.join(timeout=30)
    assert found[0][0] == found[1][0]
    for rank in (0, 1):
        resumed = train(folder, rank=rank, world_size=2)
        resumed.load_state_dict(found[0][0])
        assert take(resumed, 6) == found[rank][1]


def test_another_number_of_streams_is_said_and_goes_on_behind(folder):
    loader = train(folder, num_streams=1, batch_size=1, shuffle=0)
    take(loader, 6)
    other = train(folder, num_streams=2, batch_size=1, shuffle=0)
    with pytest.warns(UserWarning, match="num_streams 1 -> 2"):
        other.load_state_dict(loader.state_dict())
    # The loader is in the second shard.
    assert sample_names(take(other, 4)) == ["2-0", "3-0", "2-1", "3-1"]


def test_other_shards_are_said_and_a_copy_of_them_is_not(folder, tmp_path):
    state = train(folder).state_dict()
    copy = tmp_path / "copy"
    write_shards(copy)
    train(copy).load_state_dict(state)
    (copy / "part3-000000.tar").unlink()
    with pytest.warns(UserWarning, match="shards '4 with names .*' -> '3 with names"):
        train(copy).load_state_dict(state)


def test_what_decode_draws_depends_on_seed_epoch_and_sample(folder):
    def drawn(sample):
        return {"name": f"{sample['__key__']} {torch.rand(()):.6f} {random.random():.6f}"}

    before = torch.get_rng_state()
    loader = train(folder, drawn, batch_size=1)
    found = take(loader, 2 * NUM)
    assert torch.equal(torch.get_rng_state(), before)
    assert take(train(folder, drawn, batch_size=1), 2 * NUM) == found
    assert len({name.split()[1] for name in sample_names(found)}) == 2 * NUM
    assert take(train(folder, drawn, batch_size=1, seed=6), 1) != found[:1]


@pytest.fixture(params=list(DAMAGES))
def damaged(request, tmp_path):
    return damaged_shards(tmp_path, request.param)


def test_damage_is_logged_once_by_name_counted_and_skipped(damaged, caplog):
    urls, decode_it, lost, message = damaged
    loader = train(urls, decode_it, batch_size=1, shuffle=3, on_error="skip")
    left = set(names()) - lost
    found = take(loader, len(left) + 3)
    assert set(sample_names(found[: len(left)])) <= left
    assert set(sample_names(take(loader, 40))) == left
    caplog.clear()
    batches = take(train(urls, decode_it, batch_size=1, shuffle=0, on_error="skip"), len(left) + 1)
    assert sample_names(batches[:-1]) == [name for name in names() if name in left]
    # The one behind the end has begun anew, and what was lost at the end counts there.
    assert sum(batch[-1] for batch in batches) == 1
    (record,) = caplog.records
    assert record.message.startswith("skipped: ")
    assert re.search(message, record.message)


def test_damage_stops_a_run_that_says_so(damaged):
    urls, decode_it, _, message = damaged
    with pytest.raises(ValueError, match=f"{message}.*Or pass --data.on_error skip"):
        take(train(urls, decode_it), 20)


def test_shards_that_cannot_be_read_stop_a_run_before_its_patience_ends(folder):
    loader = train(folder, shuffle=1000)
    for path in folder.glob("*.tar"):
        path.unlink()
    with pytest.raises(
        ValueError, match=r"from its sample number 0 on: No such.*data.on_error skip"
    ):
        take(loader, 1)


@pytest.mark.parametrize("taken", [1, 3, 5, 8])
def test_a_position_among_damage_is_resumed(damaged, taken):
    urls, decode_it, *_ = damaged
    options = {"on_error": "skip", "num_streams": 2}
    whole = take(train(urls, decode_it, **options), 14)
    assert sum(batch[-1] for batch in whole) > 1
    loader = train(urls, decode_it, **options)
    take(loader, taken)
    resumed = train(urls, decode_it, **options)
    resumed.load_state_dict(loader.state_dict())
    assert take(resumed, 14 - taken) == whole[taken:]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_vanishes_is_reported_and_the_run_goes_on(folder, caplog, workers):
    loader = train(folder, batch_size=1, shuffle=0, on_error="skip", num_workers=workers)
    assert sample_names(take(loader, NUM)) == names()
    (folder / "part1-000000.tar").unlink()
    rest = take(loader, 2 * NUM)
    assert not any(name.startswith("1-") for name in sample_names(rest)[NUM:])
    assert sum(batch[-1] for batch in rest) >= 1
    if not workers:  # pytest sees the log of this process only
        assert "part1-000000.tar, from its sample number 0 on: No such file" in caplog.text


def test_nothing_but_damage_is_an_error_and_no_endless_loop(folder, monkeypatch):
    def hopeless(sample):
        raise ValueError("nothing fits")

    for shuffle in (0, 4, 1000):
        with pytest.raises(ValueError, match=r"none of the last \d+ shards held a sample that can"):
            take(train(folder, hopeless, shuffle=shuffle, on_error="skip"), 1)
    loader = train(folder, shuffle=1000, on_error="skip")
    opened = []
    read = TarSource.rows
    monkeypatch.setattr(
        TarSource, "rows", lambda *args, **options: opened.append(1) or read(*args, **options)
    )
    for path in folder.glob("*.tar"):
        path.write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"of 4 in all. The last problem: .*the archive is cut off"
    ):
        take(loader, 1)
    # Each may take its time to fail.
    assert len(opened) == 32


def test_an_empty_shard_is_a_problem(tmp_path, caplog):
    write_shards(tmp_path, (2,))
    tarfile.open(tmp_path / "empty.tar", "w").close()
    found = take(train(tmp_path, batch_size=1, shuffle=0, on_error="skip"), 4)
    assert [batch[-1] for batch in found] == [1, 0, 1, 0]
    assert "skipped: " in caplog.text
    assert "empty.tar: it holds no samples" in caplog.text


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"num_workers": -1}, "num_workers must be 0 or more, got -1"),
        ({"on_error": "ignore"}, "on_error must be 'skip' or 'raise', got 'ignore'"),
        ({"shuffle": -1}, "shuffle must be 0 or more, got -1"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"batches_per_epoch": 0}, "batches_per_epoch must be 1 or more, got 0"),
        (
            {"num_streams": 3, "world_size": 2, "num_workers": 2},
            "got num_streams=3, world_size=2 and num_workers=2. Pass a multiple of 4",
        ),
    ],
)
def test_wrong_options_are_refused(folder, options, match):
    with pytest.raises(ValueError, match=match):
        train(folder, **options)
