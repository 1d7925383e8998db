"""The configurations of the image recipe parse, run at tiny size and say how they are run."""

from pathlib import Path

import pytest
import torch
import yaml

import longnet_zoo as lz
from recipes.image_classification import main
from tests.recipes.classification_runs import tiny_vit, write_images

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "vision").rglob("*.yaml"))


def test_there_are_the_configs_that_are_known():
    names = {config.name for config in CONFIGS}
    assert names == {"digits_quickstart.yaml", "longvit_tcga_subtyping.yaml"}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_header_says_how_to_run_it_on_what_and_what_comes_out(config):
    header = config.read_text().split("\n\n", 1)[0]
    assert all(line.startswith("#") for line in header.splitlines())
    path = config.relative_to(ROOT).as_posix()
    assert f"python -m recipes.image_classification fit --config {path}" in header
    for heading in ("Hardware", "Expected time", "Expected result"):
        assert f"# {heading} " in header


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_parses_as_it_is(config, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--config={config}", "--print_config"])
    assert stop.value.code == 0
    written, parsed = yaml.safe_load(config.read_text()), yaml.safe_load(capsys.readouterr().out)
    assert parsed["trainer"]["max_epochs"] == written["trainer"]["max_epochs"]
    for name, value in written["model"]["optimization"].items():
        assert parsed["model"]["optimization"][name] == value


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_runs_at_tiny_size(config, tmp_path):
    written = yaml.safe_load(config.read_text())
    number = written["model"]["num_classes"]
    tiny = {**tiny_vit(), "patch_size": 8}
    options = {f"model.model_options.{name}": x for name, x in tiny.items()}
    if written["data"]["source"] != "digits":
        folder = write_images(tmp_path / "images")
        # Two subtypes.
        (folder / "blue").rename(tmp_path / "left out")
        options["data.source"] = folder
    if written["model"].get("pretrained"):
        name = written["model"]["model_name"]
        weights = lz.create_model(name, num_classes=0, **tiny).state_dict()
        torch.save(weights, tmp_path / "weights.pth")
        options["model.pretrained"] = tmp_path / "weights.pth"
    options |= {
        "model.num_classes": number,
        "data.num_workers": 0,
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.strategy": "auto",
        "trainer.fast_dev_run": "true",
        "trainer.default_root_dir": tmp_path / "run",
    }
    changes = [f"--{name}={value}" for name, value in options.items()]
    for command in ("fit", "validate", "test"):
        main([command, f"--config={config}", *changes])
    # fast_dev_run leaves nothing behind.
    assert not (tmp_path / "run").exists()


def test_subtyping_is_as_published():
    config = yaml.safe_load((ROOT / "configs/vision/longvit_tcga_subtyping.yaml").read_text())
    model, trainer, data = config["model"], config["trainer"], config["data"]
    # microsoft/torchscale, examples/longvit/get_started/get_started_for_tcga_subtyping.md, and the
    # defaults of run_longvit_finetuning.py.
    assert model["optimization"] == {
        "lr": 5e-5,
        "layer_decay": 1.0,
        "weight_decay": 0.05,
        "betas": [0.9, 0.999],
        "decay": "cosine",
        "final_lr_factor": pytest.approx(1e-6 / 5e-5),
    }
    assert (model["warmup_epochs"], trainer["max_epochs"]) == (1.0, 10)
    assert model["label_smoothing"] == 0.1
    assert model["model_options"] == {"drop_path": 0.1}
    assert data["batch_size"] * trainer["devices"] == 8
    assert data["augmentation"] == {"scale": [0.5, 1.0], "hflip": 0.5}
    info = lz.model_info(model["model_name"])
    assert info.config.img_size == (8192, 8192)
    assert info.weights[0].location.endswith("longvit_small_patch32_1024.pth")
