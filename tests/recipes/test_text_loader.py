import functools
import itertools
import warnings

import numpy as np
import pytest
import torch

from longnet_zoo.tokenizers import ByteTokenizer
from recipes.text_loader import EvalLoader, TrainLoader
from recipes.text_packing import Packer, collate

SEQ_LEN = 5
BYTES = ByteTokenizer()


@pytest.fixture
def packed():
    packer = Packer(BYTES)
    for i in range(20):
        packer.add(bytes([i]) * (i + 1))
    return packer.finish()


def _options(**options):
    options = {"objective": "causal", **options}
    return {
        "collate": functools.partial(collate, tokenizer=BYTES, **options),
        "seq_len": SEQ_LEN,
        "window_size": SEQ_LEN + (options["objective"] == "causal"),
    }


def _train(packed, *, batch_size=3, seed=0, **options):
    return TrainLoader(packed, **_options(), batch_size=batch_size, seed=seed, **options)


def _eval(packed, *, batch_size=3, objective="causal", confine=False, **options):
    collation = _options(objective=objective, confine_to_document=confine)
    return EvalLoader(packed, **collation, batch_size=batch_size, **options)


def _rows(loader):
    return [batch["tokens"].tolist() for batch in loader]


def test_epochs_differ_and_come_back(packed):
    loader = _train(packed)
    first, second = _rows(loader), _rows(loader)
    assert len(first) == len(second) == len(loader) == packed.num_tokens // SEQ_LEN // 3
    assert first != second
    again = _train(packed)
    assert _rows(again) + _rows(again) == first + second
    assert _rows(_train(packed, seed=1)) != first
    assert _rows(_train(packed, shuffle_documents=True)) != first


def test_asking_for_an_iterator_moves_nothing(packed):
    loader = _train(packed)
    expected = _rows(_train(packed))
    iter(loader)
    assert _rows(loader) == expected


def test_an_iterator_goes_on_where_the_last_one_stopped(packed):
    whole, loader = _train(packed), _train(packed)
    expected = _rows(whole) + _rows(whole)
    parts = [itertools.islice(loader, count) for count in (4, 0, 10, 15)]
    assert [rows for part in parts for rows in _rows(part)] == expected[:29]


@pytest.mark.parametrize("taken", [0, 1, 4, 15, 17])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_position_is_resumed(packed, taken, num_workers):
    whole = _train(packed)
    expected = _rows(whole) + _rows(whole) + _rows(whole)
    loader = _train(packed, num_workers=num_workers)
    taken_rows = _rows(itertools.islice(itertools.chain(loader, loader), taken))
    state = loader.state_dict()
    # Taken after the state, so not counted.
    next(iter(loader))
    resumed = _train(packed, num_workers=num_workers)
    resumed.load_state_dict(state)
    iter(resumed)
    assert taken_rows + _rows(resumed) == expected[: taken + 15]


def test_ranks_share_the_batches_of_one_process(packed):
    whole = _rows(_train(packed, batch_size=6))
    ranks = [_rows(_train(packed, batch_size=3, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [first + second for first, second in zip(*ranks, strict=True)] == whole


@pytest.mark.parametrize(("repeat", "batches"), [(1, 1), (2, 2), (0.5, 8), (1.0, 15), (99, 15)])
def test_batches_can_be_repeated(packed, repeat, batches):
    loader = _train(packed, repeat=repeat)
    rows = _rows(loader) + _rows(loader)
    first = _rows(_train(packed))[:batches]
    assert rows == (first * 30)[:30]


def test_the_global_random_state_is_left_alone(packed):
    before = torch.get_rng_state()
    _rows(_train(packed))
    _rows(_eval(packed))
    assert torch.equal(before, torch.get_rng_state())


def test_data_in_another_order_is_reported(packed):
    loader = _train(packed, corpus="one")
    _rows(itertools.islice(loader, 4))
    state = loader.state_dict()
    other = _train(packed, corpus="two", seed=1)
    with pytest.warns(UserWarning, match="corpus 'one' -> 'two', seed 0 -> 1. Training goes on"):
        other.load_state_dict(state)
    halved = _train(packed, corpus="one", batch_size=2)
    with pytest.warns(UserWarning, match="batch_size 3 -> 2"):
        halved.load_state_dict(state)
    # Twelve windows were seen.
    assert _rows(halved)[:17] == _rows(_train(packed, batch_size=2))[6:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _train(packed, corpus="one").load_state_dict(state)


def test_too_few_windows_for_a_step_are_an_error(packed):
    assert packed.num_tokens // SEQ_LEN == 46
    assert len(_train(packed, batch_size=21, world_size=2)) == 1
    message = "batch_size=24 on 2 processes takes 48 windows, and 230 tokens hold 46 of seq_len=5"
    with pytest.raises(ValueError, match=message):
        _train(packed, batch_size=24, world_size=2)


def test_evaluation_sees_every_window_once_in_a_fixed_order(packed):
    loader = _eval(packed)
    rows = [row for batch in _rows(loader) for row in batch]
    expected = packed.tokens[: 45 * SEQ_LEN].reshape(45, SEQ_LEN).tolist()
    assert sorted(rows) == sorted(expected)
    assert rows != expected
    assert _rows(loader) == _rows(_eval(packed, num_workers=2))
    assert [len(batch) for batch in _rows(_eval(packed, batch_size=4))] == [4] * 11 + [1]
    assert len(_eval(packed, batch_size=4)) == 12
    labels = [row for batch in loader for row in batch["labels"].tolist()]
    following = packed.tokens[1 : 45 * SEQ_LEN + 1].reshape(45, SEQ_LEN).tolist()
    assert sorted(labels) == sorted(following)


def test_masked_evaluation_needs_no_token_beyond_the_window(packed):
    assert len(_eval(packed, batch_size=1, objective="masked")) == 46
    assert len(_eval(packed, batch_size=1)) == 45
    first, second = (
        [(batch["tokens"].tolist(), batch["labels"].tolist()) for batch in loader]
        for loader in [_eval(packed, objective="masked")] * 2
    )
    assert first == second


@pytest.mark.parametrize("confine", [False, True])
def test_ranks_evaluate_every_window_once(packed, confine):
    ranks = [_eval(packed, rank=rank, world_size=4, confine=confine) for rank in range(4)]
    assert {len(rank) for rank in ranks} == {4}
    found = []
    for rank in ranks:
        for batch in rank:
            rows = zip(
                batch["tokens"].view(-1, SEQ_LEN), batch["labels"].view(-1, SEQ_LEN), strict=True
            )
            found += [tokens.tolist() for tokens, labels in rows if (labels != -100).any()]
    expected = packed.tokens[: 45 * SEQ_LEN].reshape(45, SEQ_LEN).tolist()
    assert sorted(found) == sorted(expected)


def test_batches_are_tensors_of_their_own(packed):
    batch = next(iter(_train(packed)))
    before = packed.tokens.copy()
    batch["tokens"].fill_(0)
    assert np.array_equal(packed.tokens, before)
