"""The recipe of long-range tasks: it learns, costs what it says, resumes, and saves its model."""

import json
import re

import pytest
import torch

import longnet_zoo as lz
from longnet_zoo.long_range import (
    IGNORE_INDEX,
    SelectiveCopying,
    Source,
    binomial_interval,
    draw_examples,
    flops_per_example,
    load_source,
    majority,
    make_task,
    score,
)
from recipes import long_range
from recipes.long_range import LongRange
from recipes.long_range_data import LengthPlan, LongRangeDataModule, growing_tasks
from tests.recipes.text_runs import curve, make_trainer, read_rows

TINY = {"embed_dim": 32, "num_layers": 2, "num_heads": 2}
COPY = {"task": "selective_copying", "task_options": {"num_data_tokens": 1, "vocab_size": 6}}


def make_task_module(**options):
    usual = {
        **COPY,
        "seq_len": 16,
        "model_options": TINY,
        "segment_lengths": (8, 16),
        "dilation_rates": (1, 2),
        "optimization": {"lr": 3e-3},
    }
    return LongRange(**usual | options)


def arguments(run_dir, *more, **changes):
    options = {
        "trainer.accelerator": "cpu",
        "trainer.log_every_n_steps": 1,
        "trainer.default_root_dir": run_dir,
        "model.task": "selective_copying",
        "model.task_options": "{num_data_tokens: 1, vocab_size: 6}",
        "model.seq_len": 16,
        "model.segment_lengths": "[8, 16]",
        "model.dilation_rates": "[1, 2]",
        **{f"model.model_options.{name}": value for name, value in TINY.items()},
        "data.batch_size": 4,
        "data.test_examples": 20,
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    return [*(f"--{name}={value}" for name, value in options.items()), *more]


def test_it_learns_to_copy(tmp_path, capsys):
    # One data token among noise: a lookup, which is learnt in seconds.
    changes = {"model__optimization__lr": 1e-2, "data__batch_size": 32, "data__seed": 3}
    long_range.main(["fit", *arguments(tmp_path, trainer__max_steps=150, **changes)])
    losses = list(curve(tmp_path, "train_loss").values())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["test"]["asked"] == found["test"]["examples"] == 20
    # Chance is a quarter.
    assert found["test"]["right"] >= 15
    assert found["test"]["chance"] == 1 / 4
    assert found["test"]["interval"] == list(binomial_interval(found["test"]["right"], 20))
    task = SelectiveCopying(seq_len=16, num_data_tokens=1, vocab_size=6)
    examples = draw_examples(task, 20, seed=3)
    assert found["test"]["majority"] == majority(task, examples, seed=3)
    printed = capsys.readouterr().out
    assert f"{100 * found['test']['right'] / 20:.1f} % right" in printed
    assert "chance 25 %" in printed


def test_it_saves_a_model_that_the_evaluation_loads(tmp_path):
    long_range.main(["fit", *arguments(tmp_path, trainer__max_steps=2, model__attention="dense")])
    model, training = load_source(Source(label="a", place=str(tmp_path / "model")))
    assert model.config.pattern.is_dense
    assert training["steps"] == 2
    task = SelectiveCopying(seq_len=16, num_data_tokens=1, vocab_size=6)
    assert training["train_flops"] == 2 * 4 * flops_per_example(model, task, is_training=True)
    assert make_task("selective_copying", seq_len=16, **training["task_options"]) == task
    other, _ = load_source(Source(label="a", place=str(tmp_path / "checkpoints/last.ckpt")))
    tokens = torch.randint(6, (1, 16))
    torch.testing.assert_close(other(tokens), model(tokens), rtol=0, atol=0)


@pytest.mark.parametrize("attention", ["dilated", "dense"])
def test_steps_follow_from_the_flops(tmp_path, attention):
    task = make_task_module(attention=attention, train_flops=4e7, start_len=4)
    trainer = make_trainer(tmp_path, max_steps=-1, log_every_n_steps=1)
    trainer.fit(task, datamodule=LongRangeDataModule(batch_size=2, test_examples=4))
    costs = [
        2 * 16 // n * flops_per_example(task.model, make_task("selective_copying", seq_len=n,
        num_data_tokens=1, vocab_size=6), is_training=True)
        for n in (4, 8, 16)
    ]  # fmt: skip
    assert task.step_flops() == costs
    spent = sum(number * cost for number, cost in zip(task.plan.steps, costs, strict=True))
    assert abs(spent - 4e7) <= costs[-1] / 2
    assert trainer.global_step == sum(task.plan.steps)
    found = json.loads((tmp_path / "metrics.json").read_text())["training"]
    assert (found["steps"], found["train_flops"]) == (trainer.global_step, spent)


def test_dilated_attention_gets_more_steps_for_the_same_flops():
    steps = {}
    for attention in ("dilated", "dense"):
        task = make_task_module(seq_len=256, attention=attention, segment_lengths=(16, 256))
        flops = flops_per_example(task.model, task.task, is_training=True)
        steps[attention] = LengthPlan.for_flops([task.task], [flops], 1e9).num_steps
    assert steps["dilated"] > 1.2 * steps["dense"]


def test_lengths_grow_as_planned_and_steps_read_as_many_tokens(tmp_path):
    class Watched(LongRange):
        def training_step(self, batch, batch_idx):
            seen.append(tuple(batch["tokens"].shape))
            return super().training_step(batch, batch_idx)

    seen = []
    task = Watched(**COPY, seq_len=16, start_len=4, model_options=TINY)
    trainer = make_trainer(tmp_path, max_steps=7, accumulate_grad_batches=2)
    trainer.fit(task, datamodule=LongRangeDataModule(batch_size=3, test_examples=4))
    assert seen == [(12, 4)] * 4 + [(6, 8)] * 4 + [(3, 16)] * 6


def test_training_examples_are_new_and_held_out_ones_always_the_same(tmp_path):
    task = make_task_module(seq_len=32, task_options=None, segment_lengths=(8, 32))
    trainer = make_trainer(tmp_path, fast_dev_run=2)
    data = LongRangeDataModule(batch_size=4, val_examples=6, seed=3)
    trainer.fit(task, datamodule=data)
    batches = iter(data._make_train_loader())
    rows = torch.cat([next(batches)["tokens"] for _ in range(3)])
    assert len(rows.unique(dim=0)) == 12
    assert torch.equal(rows, task.task.batch(range(12), split="train", seed=3)["tokens"])
    for split, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        first = next(iter(loader))["tokens"]
        assert torch.equal(first, task.task.batch(range(4), split=split, seed=3)["tokens"])
    assert [len(batch["tokens"]) for batch in data.val_dataloader()] == [4, 2]
    assert not list(tmp_path.iterdir())  # fast_dev_run leaves nothing behind


def test_what_fills_an_evaluation_up_is_not_asked(tmp_path):
    task, data = make_task_module(), LongRangeDataModule(batch_size=2, val_examples=3)
    data.trainer = make_trainer(tmp_path)
    data.trainer.strategy._lightning_module = task
    dataset = data.val_dataloader()._dataset
    batch = dataset[[2, -1]]
    assert (batch["labels"][0] != IGNORE_INDEX).any()
    assert (batch["labels"][1] == IGNORE_INDEX).all()


def test_a_resumed_run_equals_an_unbroken_one(tmp_path):
    changes = {"model__start_len": 8, "model__train_flops": 1e8}
    long_range.main(["fit", *arguments(tmp_path / "whole", **changes)])
    whole = read_rows(tmp_path / "whole")
    # An end that leaves the plan as it is.
    end = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=4"]
    long_range.main(["fit", *arguments(tmp_path / "cut", *end, **changes)])
    assert len(curve(tmp_path / "cut", "train_loss")) == 4 < len(whole)
    long_range.main(["fit", *arguments(tmp_path / "cut", "--ckpt_path=last", **changes)])
    for name in ("train_loss", "seq_len", "lr"):
        assert curve(tmp_path / "cut", name) == curve(tmp_path / "whole", name)


def test_a_run_of_growing_lengths_resumes_with_its_plan_only(tmp_path, capsys):
    changes = {"model__start_len": 8}
    long_range.main(["fit", *arguments(tmp_path, trainer__max_steps=4, **changes)])
    changes["ckpt_path"] = "last"
    with pytest.raises(SystemExit):
        long_range.main(["fit", *arguments(tmp_path, trainer__max_steps=8, **changes)])
    error = capsys.readouterr().err
    assert "read 32 of 8 tokens in the first 4 steps" in error
    assert "a checkpoint that has read 16 of 8 tokens, 8 of 16 tokens" in error
    assert "Pass the train_flops, trainer.max_steps, start_len, batch_size" in error


def test_a_run_of_one_length_goes_on_for_longer_but_not_with_other_batches(tmp_path, capsys):
    long_range.main(["fit", *arguments(tmp_path, trainer__max_steps=2)])
    short = json.loads((tmp_path / "metrics.json").read_text())["training"]
    changes = {"trainer__max_steps": 3, "ckpt_path": "last"}
    long_range.main(["fit", *arguments(tmp_path, **changes)])
    longer = json.loads((tmp_path / "metrics.json").read_text())["training"]
    assert longer["steps"] == 3
    assert longer["train_flops"] == 1.5 * short["train_flops"]
    changes |= {"trainer__max_steps": 4, "data__batch_size": 2}
    with pytest.raises(SystemExit):
        long_range.main(["fit", *arguments(tmp_path, **changes)])
    assert "read 6 of 16 tokens in the first 3 steps" in capsys.readouterr().err


def test_test_takes_the_checkpoint_and_refuses_other_attention(tmp_path, capsys):
    changes = {"model__attention": "dense"}
    long_range.main(["fit", *arguments(tmp_path, trainer__max_steps=3, **changes)])
    long_range.main(["test", *arguments(tmp_path, **changes)])
    found = json.loads((tmp_path / "metrics.json").read_text())["test"]
    (printed,) = re.findall(r"test_accuracy\D+([\d.]+)", capsys.readouterr().out)
    assert float(printed) == pytest.approx(found["right"] / found["asked"])
    with pytest.raises(SystemExit):
        long_range.main(["test", *arguments(tmp_path)])
    assert "model_options.segment_lengths follows from" in capsys.readouterr().err


def test_longvit_learns_pathfinder_as_images(tmp_path, monkeypatch):
    monkeypatch.setattr(score, "_LEAST_TRAINING_EXAMPLES", 2)  # Images are slow to draw.
    options = {"patch_size": 8, "embed_dim": 16, "num_layers": 1, "num_heads": 2}
    task = LongRange(
        task="pathfinder",
        model_name="longvit_tiny_patch8_64",
        model_options=options,
        optimization={"lr": 1e-3},
    )
    assert task.model.config.grid == (4, 4)
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(task, datamodule=LongRangeDataModule(batch_size=2, test_examples=2))
    model, _ = load_source(Source(label="a", place=str(tmp_path / "model")))
    assert (model.num_classes, model.in_chans) == (2, 1)
    saved = task.hparams["model_options"]
    assert lz.create_model("longvit_tiny_patch8_64", **saved).config == task.model.config


def test_dense_attention_changes_nothing_but_the_pattern():
    dilated, dense = (make_task_module(attention=x).model for x in ("dilated", "dense"))
    assert dilated.num_params() == dense.num_params()
    pattern = {"segment_lengths": (2**30,), "dilation_rates": (1,)}
    assert dilated.config.changed(pattern) == dense.config
    assert dilated.config.segment_lengths == (8, 16)


@pytest.mark.parametrize("attention", ["dilated", "dense"])
def test_it_begins_with_the_weights_that_it_is_given(tmp_path, attention):
    weights = make_task_module().model
    weights.save_pretrained(tmp_path)
    task = make_task_module(attention=attention, pretrained=str(tmp_path))
    state = task.model.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in weights.state_dict().items())
    assert task.model.config.pattern.is_dense == (attention == "dense")
    assert "pretrained" not in task.hparams  # a checkpoint has weights of its own


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"pretrained": True, "model_options": {}},
            r"embedding.weight: \(259, 192\) instead of \(6, 192\)",
        ),
        ({"attention": "full"}, "attention must be 'dilated' or 'dense', got 'full'"),
        ({"train_flops": -1.0}, "train_flops must be positive, got -1.0"),
        ({"start_len": 6}, "got start_len=6 and seq_len=16"),
        ({"start_len": 32}, "got start_len=32 and seq_len=16"),
        ({"model_options": {"vocab_size": 7}}, "vocab_size follows from .* 6, got 7"),
        ({"model_options": {"segment_lengths": [4]}}, "segment_lengths follows .* got"),
        ({"seq_len": 17}, r"got segment_lengths=\[8, 16\] and 17 tokens"),
        ({"model_name": "longnet_audio_tiny"}, "got one of modality 'audio'"),
    ],
)
def test_options_that_cannot_be_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        make_task_module(**options)


@pytest.mark.parametrize(("train_flops", "max_steps"), [(None, -1), (1e7, 5)])
def test_a_training_has_one_end(tmp_path, train_flops, max_steps):
    task = make_task_module(train_flops=train_flops)
    trainer = make_trainer(tmp_path, max_steps=max_steps)
    words = f"got train_flops={train_flops} and max_steps={max_steps}"
    with pytest.raises(ValueError, match=words):
        trainer.fit(task, datamodule=LongRangeDataModule())


def test_flops_that_pay_for_no_step_are_refused():
    tasks = growing_tasks(SelectiveCopying(seq_len=64), 32)
    with pytest.raises(ValueError, match="a step at each of 2 lengths, got 70 and 100"):
        LengthPlan.for_flops(tasks, [80.0, 100.0], 70.0)


def test_a_plan_spends_alike_at_each_length():
    tasks = growing_tasks(SelectiveCopying(seq_len=128), 32)
    plan = LengthPlan.for_flops(tasks, [10.0, 20.0, 40.0], 3000.0)
    assert plan.steps == (100, 50, 25)
    assert [plan.task(step).seq_len for step in (0, 99, 100, 149, 150, 174, 999)] == [
        *(32, 32, 64, 64, 128, 128, 128),
    ]
    assert plan.steps_until(160) == (100, 50, 10)
    assert plan.flops([10.0, 20.0, 40.0], 160) == 1000 + 1000 + 400
    assert plan.examples_read(120, 3) == {32: 100 * 12, 64: 20 * 6}
    assert LengthPlan.for_steps(tasks, 8).steps == (2, 2, 4)


def test_a_plan_goes_on_where_another_one_has_read_the_same():
    tasks = growing_tasks(SelectiveCopying(seq_len=64), 32)
    begun, longer = LengthPlan.for_steps(tasks, 8), LengthPlan.for_steps(tasks, 20)
    for steps in (1, 4):
        longer.check_resumed(steps, 2, begun.examples_read(steps, 2))
    words = "read 20 of 32 tokens in the first 5 steps, and a checkpoint that has read 16 of 32"
    with pytest.raises(ValueError, match=words):
        longer.check_resumed(5, 2, begun.examples_read(5, 2))
    with pytest.raises(ValueError, match="a checkpoint that has read none"):
        longer.check_resumed(5, 2, {})


@pytest.mark.parametrize("name", ["batch_size", "val_examples", "test_examples"])
def test_numbers_of_examples_are_checked(name):
    with pytest.raises(ValueError, match=f"{name} must be 1 or more, got 0"):
        LongRangeDataModule(**{name: 0})
