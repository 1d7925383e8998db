"""The configurations of the multimodal recipe parse, run at tiny size and say how they are run."""

from pathlib import Path

import pytest
import yaml

import longnet_zoo as lz
from recipes.multimodal import main
from recipes.shard_writer import ShardWriter
from tests.recipes.test_multimodal import MODEL
from tests.recipes.test_multimodal_loader import SAMPLES

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "multimodal").rglob("*.yaml"))


def test_there_are_the_configs_that_are_known():
    names = {config.name for config in CONFIGS}
    assert names == {"quickstart.yaml", "longnet_multimodal_shards.yaml"}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_header_says_how_to_run_it_on_what_and_what_comes_out(config):
    header = config.read_text().split("\n\n", 1)[0]
    assert all(line.startswith("#") for line in header.splitlines())
    path = config.relative_to(ROOT).as_posix()
    assert f"python -m recipes.multimodal fit --config {path}" in header
    for heading in ("Hardware", "Expected time", "Expected result"):
        assert f"# {heading} " in header


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_parses_and_makes_its_model(config, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--config={config}", "--print_config"])
    assert stop.value.code == 0
    written, parsed = yaml.safe_load(config.read_text()), yaml.safe_load(capsys.readouterr().out)
    assert parsed["model"]["model_options"] == written["model"]["model_options"]
    for name, value in written["model"]["optimization"].items():
        assert parsed["model"]["optimization"][name] == value
    entry = lz.model_info(written["model"]["model_name"]).config
    made = entry.changed(written["model"]["model_options"])
    assert made.names == ("video", "audio", "text")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_runs_at_tiny_size(config, tmp_path):
    written = yaml.safe_load(config.read_text())
    options = {f"model.model_options.{name}": value for name, value in MODEL.items()}
    if written["data"]["source"] != "scenes":
        with ShardWriter(tmp_path) as writer:
            for number in range(3):
                for key in ("whole", "silent", "heard", "broken"):
                    writer.write(f"{key}{number}", SAMPLES[key])
        shard = next(tmp_path.glob("*.tar"))
        options |= {"data.source": shard, "data.shards.val": shard, "data.shards.test": shard}
        options |= {"data.class_names": ["cat", "dog"]}
    options |= {
        "data.batch_size": 3,
        "data.num_workers": 0,
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.strategy": "auto",
        "trainer.precision": "32-true",
        "trainer.fast_dev_run": "true",
        "trainer.default_root_dir": tmp_path / "run",
    }
    changes = [f"--{name}={value}" for name, value in options.items()]
    for command in ("fit", "test"):
        main([command, f"--config={config}", *changes])
    # fast_dev_run leaves nothing behind.
    assert not (tmp_path / "run").exists()
