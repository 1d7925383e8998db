import itertools

import pytest
import torch

from recipes.classification_metrics import UNLABELLED
from recipes.sample_loader import EvalLoader, TrainLoader
from recipes.slide_loader import Slide, collate, slide_source
from tests.recipes.slide_runs import DIM, draw_slide


class Slides:
    """Eleven slides of 3, 4, 5, 3, ... tiles."""

    labels = tuple(i % 2 for i in range(11))
    input_dim = DIM

    def __getitem__(self, index):
        tiles, coords = draw_slide(index, num_tiles=3 + index % 3)
        return Slide(tiles, coords.float(), self.labels[index], str(index))


def take(loader, number):
    batches = itertools.chain.from_iterable(loader for _ in iter(int, 1))
    return list(itertools.islice(batches, number))


def names(batches):
    return [batch["names"] for batch in batches]


def train(slides, max_tiles=None, **options):
    return TrainLoader(slide_source(slides, max_tiles=max_tiles), **options)


def evaluate(slides, **options):
    return EvalLoader(slide_source(slides), **{"places": range(len(slides.labels)), **options})


def test_a_batch_is_padded_on_the_right():
    slides = [Slides()[i] for i in (2, 0)]
    batch = collate(slides)
    assert batch["tiles"].shape == (2, 5, 5)
    assert batch["coords"].shape == (2, 5, 2)
    assert batch["padding_mask"].tolist() == [[False] * 5, [False] * 3 + [True] * 2]
    assert torch.equal(batch["tiles"][1, :3], slides[1].tiles)
    assert not batch["tiles"][1, 3:].any()
    assert batch["labels"].tolist() == [0, 0]
    assert batch["names"] == ["2", "0"]


def test_every_epoch_shows_each_slide_once_in_another_order():
    loader = train(Slides(), batch_size=1)
    epochs = [names(take(loader, 11)) for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted([str(i)] for i in range(11))
    assert epochs[0] != epochs[1]
    assert names(take(train(Slides(), batch_size=1, seed=1), 11)) != epochs[0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_loader_goes_on_where_it_was(num_workers):
    options = {"batch_size": 2, "max_tiles": 3, "num_workers": num_workers}
    expected = take(train(Slides(), **options), 9)
    first = train(Slides(), **options)
    take(first, 7)
    second = train(Slides(), **{**options, "num_workers": 0})
    second.load_state_dict(first.state_dict())
    got = take(second, 2)
    assert names(got) == names(expected[7:])
    assert all(torch.equal(a["tiles"], b["tiles"]) for a, b in zip(got, expected[7:], strict=True))


def test_max_tiles_takes_other_tiles_each_epoch_in_their_order():
    slides, samples = Slides(), set()
    for batch in take(train(slides, batch_size=1, max_tiles=4), 8 * 11):
        tiles, coords, _, name = slides[int(batch["names"][0])]
        places = (batch["coords"][0, :, :1] == coords[:, 0]).nonzero()[:, 1]
        assert len(places) == min(4, len(tiles))
        assert places.tolist() == sorted(set(places.tolist()))
        assert torch.equal(batch["tiles"][0], tiles[places])
        if name == "2":
            samples.add(tuple(places.tolist()))
    assert len(samples) > 1


def test_ranks_share_an_epoch():
    loaders = [train(Slides(), batch_size=2, rank=rank, world_size=2) for rank in (0, 1)]
    assert [len(loader) for loader in loaders] == [2, 2]
    seen = [name for loader in loaders for batch in names(take(loader, 2)) for name in batch]
    assert len(set(seen)) == 8


@pytest.mark.parametrize(("world_size", "fillers"), [(2, 1), (3, 1), (4, 1), (13, 2)])
def test_ranks_evaluate_every_slide_once_and_fillers_do_not_count(world_size, fillers):
    ranks = [
        list(evaluate(Slides(), batch_size=1, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    found = [
        (batch["names"][0], int(batch["labels"]), batch["tiles"], batch["padding_mask"])
        for batches in ranks
        for batch in batches
    ]
    slides = {name: label for name, label, _, _ in found if name}
    assert slides == {str(i): Slides.labels[i] for i in range(11)}
    without_name = [row for row in found if not row[0]]
    assert len(without_name) == len(found) - 11 == fillers
    for _, label, tiles, padding_mask in without_name:
        assert label == UNLABELLED
        # One tile, since it is embedded for nothing.
        assert tiles.shape == (1, 1, DIM)
        assert not padding_mask.any()


def test_repeated_batches_come_again():
    got = names(take(train(Slides(), batch_size=2, repeat=2), 6))
    assert got[:2] * 3 == got
    assert got[0] != got[1]


def test_evaluation_keeps_the_order_and_can_take_some():
    loader = evaluate(Slides(), batch_size=4, num_workers=1)
    assert len(loader) == 3
    assert [name for batch in names(loader) for name in batch] == [str(i) for i in range(11)]
    assert names(evaluate(Slides(), batch_size=2, places=[5, 1, 9])) == [["5", "1"], ["9"]]


class DamagedSlides(Slides):
    """The first and the fourth one cannot be read."""

    def __getitem__(self, index):
        if index in (0, 3):
            raise ValueError(f"slide_{index}.h5: tiles must be finite.")
        return super().__getitem__(index)


def test_a_damaged_slide_is_replaced_in_training_and_logged(caplog):
    loader = train(DamagedSlides(), batch_size=11, on_error="skip")
    (batch,) = take(loader, 1)
    assert sorted(batch["names"], key=int) == ["1", "1", "2", "4", "4", *"56789", "10"]
    assert int(batch["num_skipped"]) == 2
    assert {record.message for record in caplog.records} == {
        f"skipped: slide_{i}.h5: tiles must be finite." for i in (0, 3)
    }


def test_a_damaged_slide_does_not_count_in_evaluation():
    loader = evaluate(DamagedSlides(), batch_size=2, on_error="skip")
    batches = list(loader)
    assert [name for batch in names(batches) for name in batch] == [
        *("", "1", "2", "", "4", "5", "6", "7", "8", "9", "10")
    ]
    assert [int(batch["num_skipped"]) for batch in batches] == [1, 1, 0, 0, 0, 0]
    assert batches[0]["labels"].tolist() == [UNLABELLED, 1]


def test_fillers_are_no_skipped_slides():
    (*_, last) = evaluate(Slides(), batch_size=3, rank=1, world_size=2)
    assert last["names"][-1] == ""
    assert int(last["num_skipped"]) == 0


@pytest.mark.parametrize("kind", [train, evaluate])
def test_a_damaged_slide_stops_a_run_that_says_so(kind):
    with pytest.raises(ValueError, match=r"slide_[03]\.h5: tiles .* --data.on_error skip, which"):
        take(kind(DamagedSlides(), batch_size=11), 1)


def test_an_epoch_must_fill_a_step():
    with pytest.raises(ValueError, match=r"batch_size=6 on 2 processes takes 12 slides, got 11"):
        train(Slides(), batch_size=6, world_size=2)
