"""What the command line promises: settings that win, errors one can read, runs one can repeat."""

import inspect
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Union

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from recipes.cli import RecipeCLI, _merged, _parsed
from recipes.text_data import TextDataModule
from recipes.text_lm import TextLM, main
from tests.recipes.text_runs import (
    arguments,
    curve,
    last_checkpoint_every,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A run of three steps."""
    run_dir = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["recipes.text_lm"])
        main(
            [
                "fit",
                *arguments(corpus, run_dir, trainer__max_steps=3, model__optimization__lr=1e-3),
                *last_checkpoint_every(2),
            ]
        )
    return run_dir


def error_of(capsys, args):
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    return capsys.readouterr().err


# Settings -----------------------------------------------------------------------------------------


class StockCLI(RecipeCLI):
    """Ours, with Lightning's own treatment of the checkpoint's hyperparameters."""

    _parse_ckpt_path = LightningCLI._parse_ckpt_path


@pytest.mark.parametrize(("cli", "lr"), [(RecipeCLI, 5e-3), (StockCLI, 1e-3)])
def test_command_line_wins_over_the_checkpoint(corpus, trained, cli, lr):
    # The method is private: should Lightning rename it or mend it, this says so.
    assert list(inspect.signature(LightningCLI._parse_ckpt_path).parameters) == ["self"]
    args = arguments(corpus, trained, model__optimization__lr=5e-3)
    checkpoint = trained / "checkpoints" / "last.ckpt"
    built = cli(TextLM, TextDataModule, args=["validate", *args, f"--ckpt_path={checkpoint}"])
    assert built.model.optimization.lr == lr


def test_one_is_one_batch_and_not_all_whatever_was_imported_before(monkeypatch, corpus, tmp_path):
    # What `typing` answers to `Optional[Union[int, float]]`, once it was asked for the other order.
    either = Union[float, int, None]  # noqa: UP007
    for name in ("limit_test_batches", "overfit_batches"):
        monkeypatch.setitem(L.Trainer.__init__.__annotations__, name, either)
    options = {"trainer__limit_test_batches": 1, "trainer__overfit_batches": 0.5}
    args = ["fit", *arguments(corpus, tmp_path, **options)]
    trainer = RecipeCLI(TextLM, TextDataModule, args=args).config["fit"]["trainer"]
    assert (type(trainer.limit_test_batches), trainer.overfit_batches) == (int, 0.5)


@pytest.mark.parametrize(
    ("args", "made"),
    [(["test", "--help"], ["test"]), (["--help"], ["fit", "validate", "test", "predict"])],
    ids=["a command", "none"],
)
def test_only_the_parser_of_the_command_is_made(args, made, capsys, monkeypatch):
    parsers = []
    init = RecipeCLI.init_parser

    def record(self, **options):
        parsers.append(options.get("description"))
        return init(self, **options)

    monkeypatch.setattr(RecipeCLI, "init_parser", record)
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 0
    # One more is that of the programme.
    assert len(parsers) == 1 + len(made)
    assert all(command in capsys.readouterr().out for command in made[:1])


@pytest.mark.parametrize("where", ["command line", "file"])
@pytest.mark.parametrize("option", ["model.learning_rate", "data.seqlen", "trainer.max_step"])
def test_mistyped_option_is_refused(corpus, tmp_path, capsys, option, where):
    args = ["fit", *arguments(corpus, tmp_path)]
    if where == "file":
        section, name = option.split(".")
        config = tmp_path / "config.yaml"
        config.write_text(f"{section}:\n  {name}: 3\n")
        args.append(f"--config={config}")
    else:
        args.append(f"--{option}=3")
    error = error_of(capsys, args)
    assert option.split(".")[1] in error
    assert error.startswith("usage: recipes.text_lm fit [--help] ")
    assert len(error.splitlines()) == 3


def test_mistyped_model_option_is_refused_by_name_with_the_valid_ones(corpus, tmp_path, capsys):
    args = arguments(corpus, tmp_path, model__model_options__num_headz=3)
    error = error_of(capsys, ["fit", *args])
    assert "num_headz" in error
    assert "num_heads" in error
    assert "Traceback" not in error


def test_options_of_a_part_of_a_model_are_read_and_merged():
    given = {"image": {"num_layers": "1", "drop_path": "1e-1", "norm": "pre_ln", "rates": "[1, 2]"}}
    read = _parsed(given)
    assert read["image"] == {"num_layers": 1, "drop_path": 0.1, "norm": "pre_ln", "rates": [1, 2]}
    merged = _merged({"image": {"num_layers": 3, "dropout": 0.5}, "output_dim": 4}, read)
    assert merged == {"image": {**read["image"], "dropout": 0.5}, "output_dim": 4}


def test_unknown_model_is_refused(corpus, tmp_path, capsys):
    args = arguments(corpus, tmp_path, model__model_name="longnet_lm_tinny")
    error = error_of(capsys, ["fit", *args])
    assert "longnet_lm_tinny" in error
    assert "longnet_lm_tiny" in error


def test_bad_value_is_refused_without_a_traceback(corpus, tmp_path, capsys):
    error = error_of(capsys, ["fit", *arguments(corpus, tmp_path, model__optimization__lr=-1)])
    assert "lr must be positive, got lr=-1" in error
    assert "Traceback" not in error


def test_missing_data_is_refused_without_a_traceback(tmp_path, capsys):
    error = error_of(capsys, ["fit", *arguments(tmp_path / "nowhere", tmp_path / "run")])
    assert "nowhere" in error
    assert "Traceback" not in error


def test_too_few_token_ids_are_refused(corpus, tmp_path, capsys):
    args = arguments(corpus, tmp_path, model__model_options__vocab_size=200)
    error = error_of(capsys, ["fit", *args])
    assert "got vocab_size=200 and a tokenizer with 259 ids" in error


def test_a_run_without_an_end_is_refused(corpus, tmp_path, capsys):
    args = arguments(
        corpus, tmp_path, trainer__max_steps=-1, model__optimization__decay_steps="null"
    )
    assert "decay_steps=None" in error_of(capsys, ["fit", *args])


def test_a_run_without_a_folder_is_refused(corpus, capsys):
    args = arguments(corpus, "null")
    assert "got trainer.default_root_dir=None" in error_of(capsys, ["fit", *args])


def test_a_bug_keeps_its_traceback(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(TextLM, "configure_optimizers", lambda self: {}["missing"])
    with pytest.raises(KeyError, match="missing"):
        main(["fit", *arguments(corpus, tmp_path)])


# Checkpoints --------------------------------------------------------------------------------------


def damaged(path, how):
    whole = path.read_bytes()
    return {"cut off": whole[: len(whole) // 2], "empty": b"", "text": b"not a checkpoint"}[how]


@pytest.mark.parametrize("how", ["cut off", "empty", "text"])
@pytest.mark.parametrize("command", ["fit", "validate"])
def test_damaged_checkpoint_is_one_clear_error(corpus, trained, tmp_path, capsys, how, command):
    path = tmp_path / "bad.ckpt"
    path.write_bytes(damaged(trained / "checkpoints" / "last.ckpt", how))
    args = arguments(corpus, tmp_path / "run")
    error = error_of(capsys, [command, *args, f"--ckpt_path={path}"])
    assert f"the checkpoint {path} is damaged" in error
    assert f"{path.stat().st_size:,} bytes" in error
    assert "Traceback" not in error


def test_missing_checkpoint_is_one_clear_error(corpus, tmp_path, capsys):
    args = ["fit", *arguments(corpus, tmp_path), f"--ckpt_path={tmp_path / 'no.ckpt'}"]
    assert "must be an existing file, or the complete folder of a sharded one, got " in error_of(
        capsys, args
    )


def test_other_files_of_torch_are_no_checkpoints(corpus, tmp_path, capsys):
    path = tmp_path / "weights.pt"
    torch.save({"weight": torch.zeros(2)}, path)
    args = ["fit", *arguments(corpus, tmp_path / "run"), f"--ckpt_path={path}"]
    assert "a Lightning checkpoint holds 'state_dict', got weight in" in error_of(capsys, args)


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # No shape differs.
        (
            {"segment_lengths": [8, 32], "head_offset": "block"},
            "got model_options.segment_lengths=[8, 32], model_options.head_offset='block' and a "
            "checkpoint of model_options.segment_lengths=[16, 48], "
            "model_options.head_offset='modulo'. "
            "Set model.model_options.segment_lengths to [16, 48] and so on",
        ),
        ({"num_layers": 2}, "got model_options.num_layers=2 and a checkpoint of"),
        ({"model_name": "longnet_lm_base"}, "a checkpoint of model_name='longnet_lm_tiny'. Set"),
    ],
)
def test_checkpoint_of_another_model_is_refused(corpus, trained, capsys, command, changes, message):
    names = {"model_name": "model__model_name"}
    changes = {names.get(k, f"model__model_options__{k}"): v for k, v in changes.items()}
    error = error_of(capsys, [command, *arguments(corpus, trained, **changes), "--ckpt_path=last"])
    assert message in error
    assert "Traceback" not in error
    # Nothing has been moved or overwritten.
    assert (trained / "checkpoints" / "last.ckpt").is_file()


def test_checkpoint_with_other_weights_than_its_settings_lists_the_keys(
    corpus, trained, tmp_path, capsys
):
    checkpoint = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    weights = checkpoint["state_dict"]
    weights["model.embedding.weight"] = weights["model.embedding.weight"][:, :8]
    torch.save(checkpoint, tmp_path / "odd.ckpt")
    args = arguments(corpus, trained)
    error = error_of(capsys, ["fit", *args, f"--ckpt_path={tmp_path / 'odd.ckpt'}"])
    assert " mis-shaped: model.embedding.weight: model (259, 16), checkpoint (259, 8)" in error


def test_checkpoint_brings_the_options_that_nobody_gives_and_leaves_free_ones(corpus, trained):
    args = arguments(corpus, trained, model__model_options__dropout=0.3)
    args = [arg for arg in args if "model_options" not in arg or "dropout" in arg]
    built = RecipeCLI(TextLM, TextDataModule, args=["validate", *args])
    config = built.model.model.config
    assert (config.embed_dim, config.segment_lengths) == (16, (16, 48))
    assert config.dropout == 0.3


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_evaluation_never_takes_new_weights_in_silence(corpus, tmp_path, capsys, command):
    error = error_of(capsys, [command, *arguments(corpus, tmp_path)])
    assert f"{command} needs trained weights" in error
    assert str(tmp_path / "checkpoints") in error


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_evaluation_takes_the_last_checkpoint(corpus, trained, tmp_path, capsys, command):
    before = sorted(trained.rglob("*"))
    args = arguments(corpus, trained, data__test_fraction=0.2)
    main([command, *args, "--model.sampling.max_new_tokens=8"])
    out = capsys.readouterr().out
    assert {
        "validate": "val_bits_per_byte",
        "test": "test_bits_per_byte",
        "predict": "--- prompt 1 ---\nimport os\n\n\ndef ",
    }[command] in out
    # The curve and the settings of the training stay as they are.
    assert sorted(trained.rglob("*")) == before


# A run --------------------------------------------------------------------------------------------


def test_own_loggers_and_none_are_respected(corpus, tmp_path):
    args = arguments(corpus, tmp_path / "a", trainer__logger="false")
    cli = RecipeCLI(TextLM, TextDataModule, args=["fit", *args])
    assert cli.trainer.loggers == []
    logger = ["--trainer.logger=TensorBoardLogger", f"--trainer.logger.save_dir={tmp_path / 'b'}"]
    cli = RecipeCLI(TextLM, TextDataModule, args=["fit", *arguments(corpus, tmp_path), *logger])
    assert [type(logger) for logger in cli.trainer.loggers] == [TensorBoardLogger]


def test_nothing_but_facts_is_printed(corpus, tmp_path, capfd, caplog):
    with caplog.at_level("INFO"):
        main(["fit", *arguments(corpus, tmp_path, trainer__max_steps=2)])
    printed = caplog.text + "".join(capfd.readouterr())
    assert "Training longnet_lm_tiny, 7,616 parameters" in printed
    assert "step 1/2  train 8." in printed
    for noise in ("Tip", "GPU available", "TPU", "num_workers", "Seed set", "deprecated"):
        assert noise not in printed


def test_a_name_that_the_terminal_cannot_show_stops_nothing(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(SystemExit):
        main(["test", "--help"])
    print("\udce9 é", file=terminal)


def test_an_interrupted_run_says_how_to_go_on(corpus, tmp_path, monkeypatch, capsys):
    def interrupt(task, optimizer):
        if task.trainer.global_step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(TextLM, "on_before_zero_grad", interrupt)
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            main(["fit", *arguments(corpus, tmp_path), *last_checkpoint_every(3)])
    finally:
        # Lightning leaves further interrupts ignored.
        signal.signal(signal.SIGINT, before)
    path = tmp_path / "checkpoints" / "last.ckpt"
    assert f"Resume {path} with --ckpt_path last." in capsys.readouterr().out
    assert torch.load(path, weights_only=True)["global_step"] == 3


# Strategies ---------------------------------------------------------------------------------------


def test_bf16_mixed(corpus, tmp_path):
    main(["fit", *arguments(corpus, tmp_path, trainer__precision="bf16-mixed")])
    losses = curve(tmp_path, "train_loss")
    assert losses[11] < losses[0]


@pytest.mark.distributed
def test_two_processes(corpus, tmp_path):
    options = {"trainer__devices": 2, "trainer__strategy": "ddp", "trainer__limit_val_batches": 1.0}
    args = arguments(corpus, tmp_path, **options, trainer__max_steps=10)
    done = subprocess.run(
        [sys.executable, "-m", "recipes.text_lm", "fit", *args, *last_checkpoint_every(5)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(curve(tmp_path, "train_loss")) == list(range(10))
    # An odd number of windows on two processes, and yet every token counts once.
    in_training = curve(tmp_path, "val_loss")[9]
    args = arguments(corpus, tmp_path, trainer__limit_val_batches=1.0)
    task = RecipeCLI(TextLM, TextDataModule, args=["validate", *args]).model
    assert in_training == pytest.approx(task.held_out.loss, abs=1e-6)
