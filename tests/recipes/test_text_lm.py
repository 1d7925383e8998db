"""The causal language model: exact bits per byte, checkpoints, random numbers."""

import math
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import yaml
from torch.nn import functional as F

from longnet_zoo.layers import MemorySaving
from recipes.callbacks import ExactResumption, Throughput
from recipes.checkpoints import check_state_dict, last_checkpoint
from recipes.context_warmup import ContextWarmup
from recipes.metrics import BitsPerByte
from recipes.optimization import OptimizationConfig
from recipes.text_lm import TextLM, main
from tests.recipes.text_runs import (
    arguments,
    curve,
    last_checkpoint_every,
    make_data,
    make_trainer,
    model_options,
)


def make_task(**options):
    return TextLM(model_options=model_options(), **options)


# Training and evaluation --------------------------------------------------------------------------


def test_memory_saving_is_switched_on_from_a_file_and_changes_no_loss(corpus, tmp_path):
    options = {"trainer__max_steps": 3, "model__model_options__dropout": 0.0}
    main(["fit", *arguments(corpus, tmp_path / "plain", **options)])
    config = tmp_path / "saving.yaml"
    config.write_text("model:\n  memory_saving:\n    chunk_size: 48\n    offload: true\n")
    run_dir = tmp_path / "saving"
    main(["fit", f"--config={config}", *arguments(corpus, run_dir, **options)])
    saved = yaml.safe_load((run_dir / "config.yaml").read_text())["model"]["memory_saving"]
    assert saved == {"chunk_size": 48, "keep_attention": False, "offload": True}
    losses, expected = curve(run_dir, "train_loss"), curve(tmp_path / "plain", "train_loss")
    assert losses == pytest.approx(expected, rel=1e-5)


def test_memory_saving_reaches_the_model_and_comes_back_from_a_checkpoint(corpus, tmp_path):
    saving = MemorySaving(chunk_size=5)
    task, trainer = make_task(memory_saving=saving), make_trainer(tmp_path, max_steps=1)
    trainer.fit(task, datamodule=make_data(corpus))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = TextLM.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert {block.memory_saving for block in again.model.stack.blocks} == {saving}


def test_bad_memory_saving_is_refused(corpus, tmp_path, capsys):
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        make_task(memory_saving={"chunk_size": 0})
    with pytest.raises(SystemExit):
        main(["fit", *arguments(corpus, tmp_path, model__memory_saving__chunks=4)])
    assert "chunks" in capsys.readouterr().err


def test_training_lowers_the_loss(corpus, tmp_path):
    main(["fit", *arguments(corpus, tmp_path, trainer__max_steps=20, model__optimization__lr=0.01)])
    losses = curve(tmp_path, "train_loss")
    assert losses[19] < losses[0] - 1.0
    assert set(curve(tmp_path, "grad_norm")) == set(losses)
    assert min(curve(tmp_path, "grad_norm").values()) > 0


@pytest.mark.parametrize("confine", [False, True])
def test_bits_per_byte_are_summed_over_all_tokens(corpus, tmp_path, confine):
    task = make_task()
    # 5 does not divide the number of windows, so a mean of batch means would be wrong.
    data = make_data(corpus, batch_size=5, confine_to_document=confine)
    trainer = make_trainer(tmp_path, limit_val_batches=1.0)
    (logged,) = trainer.validate(task, datamodule=data, verbose=False)

    task.eval()
    nats, num_tokens, num_bytes = 0.0, 0, 0
    for batch in data.val_dataloader():
        with torch.no_grad():
            logits = task.model(batch["tokens"], cu_seqlens=batch.get("cu_seqlens"))
        labels = batch["labels"].flatten()
        nats += float(F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum"))
        num_tokens += int((labels >= 0).sum())
        # Byte tokens below 256 are a byte each, the end of a document is none.
        num_bytes += int(((labels >= 0) & (labels < 256)).sum())
    assert num_bytes < num_tokens
    assert logged["val_loss"] == pytest.approx(nats / num_tokens, rel=1e-6)
    assert logged["val_bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-6)


def test_accumulated_batches_are_one_row_of_the_curve(corpus, tmp_path):
    args = arguments(
        corpus,
        tmp_path,
        trainer__accumulate_grad_batches=2,
        trainer__max_steps=2,
        model__model_options__dropout=0.0,
    )
    main(["fit", *args])
    # The first step is two batches.
    data = make_data(corpus)
    data.setup("fit")
    L.seed_everything(0, verbose=False)
    task = make_task()
    task.model.eval()
    batches = iter(data.train_dataloader())
    first = [next(batches), next(batches)]
    with torch.no_grad():
        mean = sum(task.model.loss(batch["tokens"], batch["labels"]) for batch in first) / 2
    assert curve(tmp_path, "train_loss")[0] == pytest.approx(float(mean), rel=1e-5)
    assert sorted(curve(tmp_path, "train_loss")) == [0, 1]


def test_context_warmup_cuts_training_batches_only(corpus, tmp_path):
    class Watched(TextLM):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            seen.append(batch["tokens"].shape[1])

        def on_validation_batch_end(self, outputs, batch, batch_idx):
            held_out.add(batch["tokens"].shape[1])

    seen, held_out = [], set()
    task = Watched(model_options=model_options(), context_warmup=ContextWarmup(start=128, steps=3))
    trainer = make_trainer(tmp_path, max_steps=4, limit_val_batches=1, val_check_interval=1)
    trainer.fit(task, datamodule=make_data(corpus, seq_len=384))
    assert seen == [128, 256, 384, 384]
    assert held_out == {384}


def test_context_warmup_grows_by_optimizer_steps_and_not_by_batches(corpus, tmp_path):
    class Watched(TextLM):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            seen.append(batch["tokens"].shape[1])

    seen = []
    task = Watched(model_options=model_options(), context_warmup=ContextWarmup(start=128, steps=3))
    trainer = make_trainer(tmp_path, accumulate_grad_batches=2, limit_val_batches=0)
    trainer.fit(task, datamodule=make_data(corpus, seq_len=384))
    assert seen == [128, 128, 256, 256, 384, 384]


def test_a_task_without_the_tokenizer_of_its_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got datamodule=None"):
        make_trainer(tmp_path).validate(make_task(), [{"tokens": torch.zeros(1, 8).long()}])


def test_throughput_is_logged_and_adds_up_over_resumption(corpus, tmp_path):
    args = [*arguments(corpus, tmp_path, trainer__max_steps=3), *last_checkpoint_every(3)]
    main(["fit", *args])
    before = max(curve_of_clock(tmp_path, "train_seconds"))
    main(["fit", *args, "--ckpt_path=last", "--trainer.max_steps=5"])
    assert max(curve_of_clock(tmp_path, "train_seconds")) > before
    assert min(curve_of_clock(tmp_path, "tokens_per_second")) > 0


def curve_of_clock(run_dir, name):
    lines = (run_dir / "metrics.csv").read_text().splitlines()
    place = lines[0].split(",").index(name)
    return [float(line.split(",")[place]) for line in lines[1:] if line.split(",")[place]]


def test_throughput_needs_a_window():
    with pytest.raises(ValueError, match="window must be 1 or more, got 0"):
        Throughput(window=0)


def test_random_numbers_differ_between_steps_and_ranks():
    draws = set()
    callback = ExactResumption()
    for rank in (0, 1):
        for batches in (1, 2, 3):
            progress = SimpleNamespace(total=SimpleNamespace(ready=batches))
            loop = SimpleNamespace(
                epoch_loop=SimpleNamespace(batch_progress=progress),
                _combined_loader=SimpleNamespace(_load_state_dicts=lambda states: None),
                _combined_loader_states_to_load=[],
            )
            trainer = SimpleNamespace(fit_loop=loop, global_rank=rank, global_step=batches - 1)
            callback.on_train_start(trainer, None)
            callback.on_train_batch_start(trainer, None, None, 0)
            draws.add(torch.rand(()).item())
    assert len(draws) == 6


# Checkpoints --------------------------------------------------------------------------------------


def test_checkpoint_from_python_loads_with_weights_only(corpus, tmp_path):
    task = make_task(optimization=OptimizationConfig(lr=2e-3, betas=(0.8, 0.9)))
    trainer = make_trainer(tmp_path)
    trainer.fit(task, datamodule=make_data(corpus))
    trainer.save_checkpoint(tmp_path / "python.ckpt")
    loaded = TextLM.load_from_checkpoint(tmp_path / "python.ckpt", weights_only=True)
    assert_same_task(loaded, task)
    # And it can be resumed.
    again = make_trainer(tmp_path, max_steps=4)
    again.fit(
        make_task(optimization=OptimizationConfig(lr=2e-3)),
        datamodule=make_data(corpus),
        ckpt_path=tmp_path / "python.ckpt",
        weights_only=True,
    )
    assert again.global_step == 4


def test_checkpoint_from_the_command_line_loads_with_weights_only(corpus, tmp_path):
    args = arguments(corpus, tmp_path, model__optimization__lr=2e-3, trainer__max_steps=2)
    main(["fit", *args, *last_checkpoint_every(1), "--model.optimization.betas=[0.8,0.9]"])
    path = last_checkpoint(tmp_path)
    loaded = TextLM.load_from_checkpoint(path, weights_only=True)
    assert loaded.optimization.lr == 2e-3
    assert loaded.optimization.betas == (0.8, 0.9)
    assert loaded.model.config.embed_dim == 16
    # What Python stores is what the command line stores.
    stored = torch.load(path, weights_only=True)["hyper_parameters"]
    assert set(stored) == set(make_task().hparams)
    assert set(stored["optimization"]) == set(make_task().hparams["optimization"])
    assert stored["model_name"] == "longnet_lm_tiny"


def assert_same_task(got, expected):
    assert dict(got.hparams) == dict(expected.hparams)
    assert got.optimization == expected.optimization
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(got.state_dict()[name], value, rtol=0, atol=0)


def test_another_optimizer_is_refused_from_python_too(corpus, tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.fit(make_task(), datamodule=make_data(corpus))
    trainer.save_checkpoint(tmp_path / "adamw.ckpt")
    task = make_task(optimization=OptimizationConfig(optimizer="muon"))
    with pytest.raises(ValueError, match="optimizer='muon' and a checkpoint of optimizer='adamw'"):
        make_trainer(tmp_path, max_steps=4).fit(
            task, datamodule=make_data(corpus), ckpt_path=tmp_path / "adamw.ckpt", weights_only=True
        )
    # Without training the optimizer does not matter.
    make_trainer(tmp_path).validate(
        task, datamodule=make_data(corpus), ckpt_path=tmp_path / "adamw.ckpt", weights_only=True
    )


def test_throughput_counts_what_it_is_told_to(corpus, tmp_path):
    class Counting(TextLM):
        def configure_callbacks(self):
            return [Throughput(unit="windows", count=lambda batch: len(batch["tokens"]), window=9)]

    trainer = make_trainer(tmp_path)
    trainer.fit(Counting(model_options=model_options()), datamodule=make_data(corpus))
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    # Three steps of two windows.
    windows = logged["windows_per_second"] * logged["train_seconds"]
    assert windows == pytest.approx(6, rel=1e-4)
    assert "tokens_per_second" not in logged


def test_checkpoint_of_another_shape_is_refused_from_python_too(corpus, tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.fit(make_task(), datamodule=make_data(corpus))
    trainer.save_checkpoint(tmp_path / "small.ckpt")
    with pytest.raises(ValueError, match=r"mis-shaped: .*model \(259, 32\), checkpoint \(259, 16"):
        TextLM.load_from_checkpoint(
            tmp_path / "small.ckpt", model_options=model_options(embed_dim=32)
        )


def test_differing_keys_are_counted_and_the_first_are_listed():
    some = torch.zeros(1)
    expected = {f"layer.{i}": some for i in range(12)}
    with pytest.raises(ValueError, match=r"12 missing: layer\.0, .*, layer\.7 and 4 more"):
        check_state_dict(expected, {})
    with pytest.raises(ValueError, match=r"1 unexpected: other\. Use the model_name"):
        check_state_dict({"a": some}, {"a": some, "other": some})
    check_state_dict(expected, expected)


# Metrics ------------------------------------------------------------------------------------------


def test_sums_of_nothing_are_zero_and_not_nan():
    assert BitsPerByte().bits_per_byte == 0.0
    assert BitsPerByte().loss == 0.0


def test_sums_are_weighted_by_tokens_and_bytes():
    sums = BitsPerByte()
    sums.update(nats=10.0, num_tokens=2, num_bytes=8)
    sums.update(nats=2.0, num_tokens=4, num_bytes=16)
    sums.reduce(None)
    assert sums.loss == pytest.approx(2.0)
    assert sums.bits_per_byte == pytest.approx(12 / math.log(2) / 24)
