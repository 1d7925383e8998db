from types import SimpleNamespace

import pytest
import torch

import recipes.slide_baselines as slide_baselines
from recipes.baselines import BaselineConfig
from recipes.classification import UNLABELLED
from recipes.slide_baselines import compare, mean_of_tiles
from recipes.slide_loader import Slide, collate
from tests.recipes.classification_runs import quiet_trainer


def test_the_mean_leaves_padding_out():
    slides = [Slide(torch.randn(n, 5), torch.zeros(n, 2), 0, "") for n in (3, 7)]
    batch = collate(slides)
    batch["tiles"][0, 3:] = float("nan")
    mean = mean_of_tiles(batch["tiles"], batch["coords"], batch["padding_mask"])
    torch.testing.assert_close(mean, torch.stack([slide.tiles.mean(0) for slide in slides]))


def make_slides(number):
    labels = [i % 2 for i in range(number)]
    return [Slide(torch.randn(3, 5) + 3 * y, torch.zeros(3, 2), y, str(y)) for y in labels]


def test_baselines_are_fitted_on_one_set_and_judged_on_another(tmp_path):
    slides = make_slides(20)
    # Wrong labels, so that good figures could only come from the training set.
    held_out = [slide._replace(label=1 - slide.label) for slide in make_slides(10)]
    results = compare(
        quiet_trainer(tmp_path),
        {"mean": mean_of_tiles, "nothing": lambda tiles, *_: torch.zeros(len(tiles), 2)},
        train=[collate(slides[:10]), collate(slides[10:])],
        held_out=[collate(held_out)],
        num_classes=2,
        config=BaselineConfig(l2=1e-3),
    )
    assert results["mean"]["accuracy"] == 0
    assert results["nothing"]["accuracy"] == 0.5


def test_processes_share_what_they_embedded(monkeypatch):
    own, other = make_slides(4), make_slides(6)
    other_part = ({"mean": [torch.stack([x.tiles.mean(0) for x in other])]}, [torch.arange(6)])

    def gather(into, mine):
        into[:] = [mine, other_part]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    trainer = SimpleNamespace(
        world_size=2, strategy=SimpleNamespace(root_device=torch.device("cpu"))
    )
    x, labels = slide_baselines._embed(trainer, {"mean": mean_of_tiles}, [collate(own)])
    expected = torch.stack([slide.tiles.mean(0) for slide in own + other])
    torch.testing.assert_close(x["mean"], expected)
    assert labels.tolist() == [0, 1, 0, 1, 0, 1, 2, 3, 4, 5]


def test_slides_without_a_label_do_not_count(tmp_path):
    unknown = [slide._replace(label=UNLABELLED) for slide in make_slides(4)]
    batches = [collate(unknown), collate(make_slides(4))]
    x, labels = slide_baselines._embed(quiet_trainer(tmp_path), {"mean": mean_of_tiles}, batches)
    assert x["mean"].shape == (4, 5)
    assert labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("options", [{"max_samples": 0}, {"l2": 0.0}])
def test_bad_options_are_refused(options):
    got = {"max_samples": 4096, "l2": 0.01, **options}
    message = rf"max_samples={got['max_samples']} and l2={got['l2']}\."
    with pytest.raises(ValueError, match=message):
        BaselineConfig(**options)
