"""The optimizers' groups and the learning rate, also across a restored checkpoint."""

import dataclasses
import math

import pytest
import torch
from torch import nn

import longnet_zoo as lz
from recipes.optimization import (
    OptimizationConfig,
    decay_groups,
    learning_rate_factor,
    muon_groups,
)
from recipes.text_lm import TextLM
from tests.recipes.text_runs import model_options


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"decay": "polynomial"}, [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
        ({"decay": "polynomial", "decay_power": 2.0}, [0.25, 0.5, 0.75, 1, 1, 9 / 16, 1 / 4]),
        (
            {"decay": "cosine", "final_lr_factor": 0.1},
            [0.25, 0.5, 0.75, 1.0, 1.0, 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2, 0.55],
        ),
        (
            {"decay_start": 6, "final_lr_factor": 0.5},
            [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.5],
        ),
    ],
)
def test_learning_rate_warms_up_and_decays(options, expected):
    config = OptimizationConfig(warmup_steps=4, **options)
    got = [learning_rate_factor(i, config=config, total_steps=8) for i in range(len(expected))]
    assert got == pytest.approx(expected)


def test_a_run_shorter_than_its_warm_up_stays_in_it():
    config = OptimizationConfig(warmup_steps=10)
    got = [learning_rate_factor(i, config=config, total_steps=2) for i in range(3)]
    assert got == pytest.approx([0.1, 0.2, 0.3])


def test_only_matrices_decay_and_not_those_the_model_exempts():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 3)
            self.table = nn.Parameter(torch.zeros(2, 2))
            self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)

        def no_weight_decay(self):
            return {"table"}

    net = Net()
    decayed, exempt = decay_groups(net, 0.3)
    assert decayed["params"] == [net.linear.weight]
    assert decayed["weight_decay"] == 0.3
    assert {id(p) for p in exempt["params"]} == {id(net.linear.bias), id(net.table)}
    assert exempt["weight_decay"] == 0.0


def test_every_parameter_of_the_model_is_trained_once():
    task = TextLM(model_options=model_options())
    groups = decay_groups(task.model, 0.1)
    parameters = [p for group in groups for p in group["params"]]
    assert len(parameters) == len({id(p) for p in parameters}) == len(list(task.parameters()))


def test_restored_schedule_keeps_its_place_and_takes_the_new_settings():
    def build(**options):
        config = OptimizationConfig(warmup_steps=2, decay_steps=10, **options)
        return config.build(nn.Linear(2, 2), run_steps=10)

    old = build(lr=1.0, weight_decay=0.1, betas=(0.5, 0.6))
    schedule = old["lr_scheduler"]["scheduler"]
    for _ in range(4):
        old["optimizer"].step()
        schedule.step()
    new = build(lr=2.0, weight_decay=0.2, betas=(0.7, 0.8))
    new["optimizer"].load_state_dict(old["optimizer"].state_dict())
    assert new["optimizer"].param_groups[0]["weight_decay"] == 0.1
    new["lr_scheduler"]["scheduler"].load_state_dict(schedule.state_dict())
    group = new["optimizer"].param_groups[0]
    assert group["lr"] == pytest.approx(2.0 * (10 - 4) / 8)
    assert group["weight_decay"] == 0.2
    assert group["betas"] == (0.7, 0.8)
    assert new["optimizer"].param_groups[1]["weight_decay"] == 0.0
    new["optimizer"].step()
    new["lr_scheduler"]["scheduler"].step()
    assert group["lr"] == pytest.approx(2.0 * (10 - 5) / 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer must be 'adamw' or 'muon', got optimizer=sgd"),
        (
            {"optimizer": "muon", "muon_adamw_lr_scale": 0.0},
            "must be positive, got muon_adamw_lr_scale=0.0",
        ),
        (
            {"muon_adamw_lr_scale": 0.5},
            "is for optimizer='muon', got optimizer=adamw, muon_adamw_lr_scale=0.5",
        ),
        ({"layer_decay": 0.0}, r"layer_decay must be in \(0, 1\], got layer_decay=0.0"),
        ({"layer_decay": 1.1}, r"layer_decay must be in \(0, 1\], got layer_decay=1.1"),
        (
            {"optimizer": "muon", "layer_decay": 0.9},
            "is for optimizer='adamw', got optimizer=muon, layer_decay=0.9",
        ),
        ({"lr": 0.0}, "lr must be positive, got lr=0.0"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or more, got weight_decay=-0.1"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got betas=\(0.9, 1.0\)"),
        ({"eps": 0.0}, "eps must be positive, got eps=0.0"),
        ({"warmup_steps": -1}, "warmup_steps must be 0 or more, got warmup_steps=-1"),
        ({"decay": "linear"}, "decay must be 'polynomial' or 'cosine', got decay=linear"),
        ({"decay_power": 0.0}, "decay_power must be positive, got decay_power=0.0"),
        ({"final_lr_factor": 1.5}, r"final_lr_factor must be in \[0, 1\], got final_lr_factor=1.5"),
        (
            {"decay_steps": 5, "warmup_steps": 5},
            "decay_steps must be greater than warmup_steps and decay_start, got decay_steps=5, "
            "warmup_steps=5, decay_start=None",
        ),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        OptimizationConfig(**options)


def test_muon_takes_the_matrices_and_leaves_embedding_and_vectors_to_adamw():
    model = lz.create_model("longnet_lm_tiny", **model_options())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = muon_groups(model, 0.1)
    fallback = {names[id(p)] for group in groups if group["use_fallback"] for p in group["params"]}
    muon = {names[id(p)] for group in groups if not group["use_fallback"] for p in group["params"]}
    assert fallback | muon == set(names.values())
    assert not fallback & muon
    assert "embedding.weight" in fallback
    assert all(dict(model.named_parameters())[name].ndim == 2 for name in muon)
    assert all(name.endswith("weight") and "norm" not in name for name in muon)


def test_muon_leaves_what_is_exempt_from_weight_decay_to_adamw():
    model = Blocks()
    matrices, others = muon_groups(model, 0.1)
    assert not matrices["use_fallback"]
    assert others["use_fallback"]
    assert id(model.table) in {id(p) for p in others["params"]}


def test_muon_orthogonalizes_and_scales_adamw():
    torch.manual_seed(0)
    model = nn.ModuleDict({"linear": nn.Linear(8, 8), "embedding": nn.Embedding(8, 8)})
    config = OptimizationConfig(
        optimizer="muon", lr=0.1, muon_adamw_lr_scale=0.25, weight_decay=0.0, decay_steps=10
    )
    optimizer = config.build(model, run_steps=10)["optimizer"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    update = before["linear.weight"] - model["linear"].weight
    singular_values = torch.linalg.svdvals(update.detach())
    assert singular_values.max() < 3 * singular_values.min()
    # AdamW's first step is the learning rate in the direction of the sign.
    change = (before["embedding.weight"] - model["embedding"].weight).abs()
    torch.testing.assert_close(change, torch.full_like(change, 0.025), rtol=1e-4, atol=0)


class Blocks(nn.Module):
    """Three blocks, one table without weight decay, a head."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(2, 2))
        self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.head = nn.Linear(2, 2)

    def no_weight_decay(self):
        return {"table"}

    def group_matcher(self, coarse=False):
        return {"stem": r"^table", "blocks": [(r"^blocks\.(\d+)", None)]}


def test_layer_decay_slows_each_block_by_its_distance_from_the_head():
    model, config = Blocks(), OptimizationConfig(lr=2.0, layer_decay=0.5, weight_decay=0.3)
    optimizer = config.build(model, run_steps=10)["optimizer"]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    got = {
        names[id(p)]: (group["initial_lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert got == {
        "table": (2 / 16, 0.0),
        **{f"blocks.{i}.weight": (2 / 2 ** (3 - i), 0.3) for i in range(3)},
        **{f"blocks.{i}.bias": (2 / 2 ** (3 - i), 0.0) for i in range(3)},
        "head.weight": (2.0, 0.3),
        "head.bias": (2.0, 0.0),
    }


def test_layer_decay_survives_a_restored_checkpoint():
    def build(layer_decay):
        config = OptimizationConfig(lr=1.0, layer_decay=layer_decay, decay_steps=10)
        return config.build(Blocks(), run_steps=10)

    old, new = build(0.5), build(0.25)
    for _ in range(4):
        old["optimizer"].step()
        old["lr_scheduler"]["scheduler"].step()
    new["optimizer"].load_state_dict(old["optimizer"].state_dict())
    schedule = new["lr_scheduler"]["scheduler"]
    schedule.load_state_dict(old["lr_scheduler"]["scheduler"].state_dict())
    for factor in (0.6, 0.5):
        rates = {group["lr"] for group in new["optimizer"].param_groups}
        assert sorted(rates) == pytest.approx([factor * 0.25**d for d in (4, 3, 2, 1, 0)])
        assert schedule.get_last_lr() == [group["lr"] for group in new["optimizer"].param_groups]
        new["optimizer"].step()
        schedule.step()


def test_layer_decay_needs_to_know_the_blocks():
    config = OptimizationConfig(layer_decay=0.75)
    with pytest.raises(ValueError, match=r"group_matcher\(\), got layer_decay=0.75 and Linear"):
        config.build(nn.Linear(2, 2), run_steps=10)


@pytest.mark.parametrize(
    ("now", "then", "message"),
    [
        ({}, {"optimizer": "muon"}, "optimizer='adamw' and a checkpoint of optimizer='muon'"),
        ({"layer_decay": 0.5}, {}, "layer_decay=0.5 and a checkpoint of layer_decay=1.0"),
    ],
)
def test_the_state_of_another_kind_of_optimizer_is_refused(now, then, message):
    saved = dataclasses.asdict(OptimizationConfig(**then))
    with pytest.raises(ValueError, match=message):
        OptimizationConfig(**now).check_resumed(saved)
    OptimizationConfig(lr=0.5, **then).check_resumed(saved)
