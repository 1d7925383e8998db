import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

import longnet_zoo as lz
from longnet_zoo.layers import MemorySaving
from recipes.slide_classification import SlideClassifier, main
from recipes.slide_data import SlideDataModule
from tests.recipes.classification_runs import quiet_trainer
from tests.recipes.slide_runs import tiny_encoder, write_labels, write_slides

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "slides").glob("*.yaml"))
PANDA = ROOT / "configs" / "slides" / "gigapath_panda.yaml"


@pytest.fixture
def files(tmp_path):
    source = write_slides(tmp_path / "slides")
    return {"source": str(source), "labels": str(write_labels(tmp_path / "labels.csv"))}


def arguments(files, run_dir, **changes):
    """Returns command-line arguments of a tiny run, `section__name=value` changing one."""
    options = {
        "trainer__accelerator": "cpu",
        "trainer__max_steps": 4,
        "trainer__val_check_interval": 2,
        "trainer__log_every_n_steps": 1,
        "trainer__default_root_dir": run_dir,
        "data__batch_size": 2,
        **{f"data__{name}": value for name, value in files.items()},
        **{f"model__model_options__{name}": value for name, value in tiny_encoder().items()},
        **changes,
    }
    return [f"--{name.replace('__', '.')}={value}" for name, value in options.items()]


def make_task(**options):
    options = {"model_options": tiny_encoder(), "baselines": None, **options}
    return SlideClassifier(**options)


def fit(task, files, folder, **options):
    trainer = quiet_trainer(folder, **{"max_epochs": 1, **options})
    trainer.fit(task, SlideDataModule(**files, batch_size=2))
    return trainer


def compared(run_dir):
    return json.loads((run_dir / "metrics.json").read_text())["comparison"]


def test_a_run_trains_tests_and_reports_its_baselines(files, tmp_path, capsys):
    run_dir = tmp_path / "run"
    options = arguments(files, run_dir)
    main(["fit", *options, "--trainer.callbacks=recipes.callbacks.LastCheckpoint"])
    rows = ["this run", "random encoder", "mean of the tiles", "chance"]
    printed = capsys.readouterr().out
    assert "slides from" not in printed or "train 6, val 3, test 3" in printed
    assert all(re.search(rf"^{row} ", printed, re.M) for row in rows)
    saved = compared(run_dir)
    assert list(saved) == ["val"]
    assert list(saved["val"]) == rows[:3]
    header = (run_dir / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train_loss", "val_accuracy", "val_accuracy/random_encoder"} <= set(header)
    assert {path.name for path in run_dir.glob("*.png")} == {"val_confusion.png", "pattern.png"}
    main(["test", *options])
    assert list(compared(run_dir)) == ["val", "test"]
    capsys.readouterr()
    main(["predict", *options])
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines() if "\t" in line]
    assert [line[0] for line in lines] == ["slide_09", "slide_10", "slide_11"]
    assert {line[1] for line in lines} <= {"left", "right"}


def test_a_report_moves_the_comparison_to_the_test(files, tmp_path):
    report = "--trainer.callbacks=recipes.classification_report.ClassificationReport"
    main(["fit", *arguments(files, tmp_path / "run"), report])
    assert list(compared(tmp_path / "run")) == ["test"]
    assert (tmp_path / "run" / "report.png").is_file()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns what makes the arguments of a run with a checkpoint of one step."""
    folder = tmp_path_factory.mktemp("trained")
    source, labels = write_slides(folder / "slides"), write_labels(folder / "labels.csv")
    files = {"source": source, "labels": labels}

    def options(**changes):
        return arguments(files, folder / "run", **{"model__layers": "[2]", **changes})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["recipes.slide_classification"])
        main(["fit", *options(trainer__max_steps=1, trainer__val_check_interval=1)])
    return options


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__layers": "[1]"}, "got layers=[1] and a checkpoint of layers=[2]. Set"),
        ({"model__model_options__pool": "mean"}, "checkpoint of model_options.pool='cls'. Set"),
        (
            {"model__model_options__segment_lengths": "[3, 12]"},
            "got model_options.segment_lengths=[3, 12] and a checkpoint of "
            "model_options.segment_lengths=[4, 11]. Set model.model_options.segment_lengths to",
        ),
    ],
)
def test_a_checkpoint_goes_on_as_the_model_that_was_trained(
    trained, capsys, command, changes, message
):
    with pytest.raises(SystemExit):
        main([command, *trained(**changes), "--ckpt_path=last"])
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_test_needs_no_pretrained_weights_and_keeps_their_options(files, tmp_path):
    options = tiny_encoder(head_offset="block", padded_keys="zero")
    weights = lz.create_model("gigapath_slide_enc12l768d", **options)
    torch.save(lz.weights.to_published_state_dict(weights), tmp_path / "published.pth")
    run_dir = tmp_path / "run"
    options = {"trainer__max_steps": 3, "trainer__val_check_interval": 3}
    args = arguments(files, run_dir, model__pretrained=tmp_path / "published.pth", **options)
    main(["fit", *args])
    in_training = compared(run_dir)["val"]["this run"]["loss"]
    (tmp_path / "published.pth").unlink()
    main(["validate", *args])
    saved = json.loads((run_dir / "metrics.json").read_text())
    assert saved["metrics"]["val_loss"] == pytest.approx(in_training, abs=1e-6)
    main(["test", *args])
    saved = json.loads((run_dir / "metrics.json").read_text())
    assert saved["metrics"]["test_loss"] == saved["comparison"]["test"]["this run"]["loss"]
    assert sum(map(sum, saved["test_confusion"])) == 3


def test_the_comparison_respects_the_limit_of_the_trainer(files, tmp_path):
    report = "--trainer.callbacks=recipes.classification_report.ClassificationReport"
    main(["fit", *arguments(files, tmp_path, trainer__limit_test_batches=1), report])
    saved = json.loads((tmp_path / "metrics.json").read_text())
    assert sum(map(sum, saved["test_confusion"])) == 2
    # Of two slides an accuracy is one of these.
    assert saved["comparison"]["test"]["mean of the tiles"]["accuracy"] in (0.0, 0.5, 1.0)


@pytest.mark.parametrize("name", ["longvit_tiny_patch8_64", "longnet_lm_tiny"])
def test_models_for_something_else_are_refused(name):
    message = rf"a slide encoder, got '{name}', which is none \(family .*gigapath_slide_enc12l768d"
    with pytest.raises(ValueError, match=message):
        SlideClassifier(model_name=name)


def test_baselines_can_be_left_out(files, tmp_path, capsys):
    fit(make_task(), files, tmp_path / "run")
    assert "mean of the tiles" not in capsys.readouterr().out
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_the_random_encoder_is_another_one_and_always_the_same():
    torch.manual_seed(1)
    task = make_task(baselines={"max_samples": 3})
    first, second = (task._embedders()["random encoder"] for _ in range(2))
    inputs = torch.randn(1, 7, 5), torch.arange(14).reshape(1, 7, 2) * 256.0, None
    assert torch.equal(first(*inputs), second(*inputs))
    assert not torch.equal(first(*inputs), task.model.eval().embed(*inputs))
    assert "pretrained encoder" not in task._embedders()


@pytest.mark.parametrize("freeze_encoder", [False, True])
def test_given_weights_are_compared_with_as_they_were(files, tmp_path, freeze_encoder, capsys):
    weights = lz.create_model("gigapath_slide_enc12l768d", **tiny_encoder())
    weights.save_pretrained(tmp_path / "weights")
    task = make_task(
        pretrained=str(tmp_path / "weights"),
        model_options=tiny_encoder(),
        baselines={},
        freeze_encoder=freeze_encoder,
    )
    fit(task, files, tmp_path / "run")
    assert "pretrained encoder" in capsys.readouterr().out
    given, before = task._given[0].encoder.state_dict(), weights.state_dict()
    assert all(torch.equal(given[name], value) for name, value in before.items())
    has_moved = not torch.equal(task.model.encoder.cls_token, weights.cls_token)
    assert has_moved != freeze_encoder
    # The options came with the weights, whose file nobody needs any more.
    assert task.hparams["model_options"]["embed_dim"] == 16


def test_a_checkpoint_loads_from_python(files, tmp_path):
    task = make_task(
        layers=[1, 2], class_weights="balanced", memory_saving=MemorySaving(chunk_size=9)
    )
    trainer = fit(task, files, tmp_path / "run")
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = SlideClassifier.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.parameters(), task.parameters(), strict=True)
    )
    assert loaded.model.layers == (1, 2)
    blocks = loaded.model.encoder.stack.blocks
    assert {block.memory_saving for block in blocks} == {MemorySaving(chunk_size=9)}
    assert loaded.class_names == ("left", "right")


def test_embeddings_of_another_size_are_refused(files, tmp_path):
    task = make_task(model_options=tiny_encoder(input_dim=8))
    with pytest.raises(ValueError, match=r"got input_dim=8 and embeddings of 5 channels"):
        fit(task, files, tmp_path / "run")


def test_training_learns_where_the_large_tiles_are(tmp_path):
    files = {"source": str(write_slides(tmp_path / "slides", count=40))}
    splits = ["train"] * 28 + ["val"] * 12
    files["labels"] = str(write_labels(tmp_path / "labels.csv", count=40, split=splits))
    optimization = {"lr": 3e-3, "weight_decay": 0.0}
    task = make_task(optimization=optimization, baselines={})
    fit(task, files, tmp_path / "run", max_steps=60, max_epochs=-1)
    saved = compared(tmp_path / "run")["val"]
    assert saved["this run"]["accuracy"] > 0.9
    assert saved["mean of the tiles"]["accuracy"] < 0.8


def test_there_are_the_configs_that_the_readme_names():
    assert [config.name for config in CONFIGS] == ["gigapath_panda.yaml", "quickstart.yaml"]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_says_how_to_run_it_and_runs_at_tiny_size(config, files, tmp_path):
    header = config.read_text().split("\n\n", 1)[0]
    name = config.relative_to(ROOT).as_posix()
    assert f"python -m recipes.slide_classification fit --config {name}" in header
    for heading in ("Hardware", "Expected time", "Expected result"):
        assert f"# {heading} " in header
    layers = yaml.safe_load(config.read_text())["model"].get("layers")
    changes = {"model__layers": [1] if layers else "null", "model__num_classes": 2}
    changes |= {"model__pretrained": "false", "model__model_options__tile_size": 256}
    changes |= {"trainer__devices": 1, "trainer__precision": "32-true"}
    changes |= {"trainer__val_check_interval": "null", "data__num_workers": 0}
    options = arguments(files, tmp_path / "run", trainer__fast_dev_run="true", **changes)
    for command in ("fit", "validate"):
        main([command, f"--config={config}", *options])
    # fast_dev_run leaves nothing behind.
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_parses_as_it_is(config, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--config={config}", "--print_config"])
    assert stop.value.code == 0
    written, parsed = yaml.safe_load(config.read_text()), yaml.safe_load(capsys.readouterr().out)
    for name, value in written["model"]["model_options"].items():
        assert parsed["model"]["model_options"][name] == value


def test_panda_config_is_the_published_fine_tuning():
    # github.com/prov-gigapath/prov-gigapath, scripts/run_panda.sh.
    config = yaml.safe_load(PANDA.read_text())
    model, trainer = config["model"], config["trainer"]
    batch = config["data"]["batch_size"] * trainer["accumulate_grad_batches"] * trainer["devices"]
    assert batch == 32
    optimization = model["optimization"]
    assert optimization["lr"] == pytest.approx(0.002 * batch / 256)
    assert (optimization["weight_decay"], optimization["layer_decay"]) == (0.05, 0.95)
    assert (trainer["max_epochs"], model["layers"], model["num_classes"]) == (5, [11], 6)
    with torch.device("meta"):
        built = lz.create_model(model["model_name"], **model["model_options"]).config
    assert (built.dropout, built.drop_path) == (0.1, 0.0)
    assert built.pattern.segment_lengths == (1024, 4870, 23170, 110217, 524288)
