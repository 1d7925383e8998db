"""The configurations of the image-text recipe parse, run at tiny size and say how they are run."""

import json
from pathlib import Path

import pytest
import yaml

from recipes.image_text import main
from tests.recipes.image_text_runs import tiny_options
from tests.recipes.test_image_text_shards import write_shard

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "image_text").rglob("*.yaml"))


def test_there_are_the_configs_that_are_known():
    names = {config.name for config in CONFIGS}
    assert names == {"longnet_clip_base_shards.yaml", "quickstart.yaml"}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_header_says_how_to_run_it_on_what_and_what_comes_out(config):
    header = config.read_text().split("\n\n", 1)[0]
    assert all(line.startswith("#") for line in header.splitlines())
    path = config.relative_to(ROOT).as_posix()
    assert f"python -m recipes.image_text fit --config {path}" in header
    for heading in ("Hardware", "Expected time", "Expected result"):
        assert f"# {heading} " in header


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_parses_as_it_is(config, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--config={config}", "--print_config"])
    assert stop.value.code == 0
    written, parsed = yaml.safe_load(config.read_text()), yaml.safe_load(capsys.readouterr().out)
    assert parsed["trainer"]["max_steps"] == written["trainer"]["max_steps"]
    for name, value in written["model"]["optimization"].items():
        assert parsed["model"]["optimization"][name] == value


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_runs_at_tiny_size(config, tmp_path):
    written = yaml.safe_load(config.read_text())
    sizes, given = tiny_options(), written["model"].get("model_options") or {}
    # What belongs to the tokenizer stays.
    sizes |= {name: given[name] for name in {"pad_id"} & given.keys()}
    sizes["text"]["vocab_size"] = given.get("text", {}).get("vocab_size", 259)
    options = {
        "model.model_options": json.dumps(sizes),
        "data.num_workers": 0,
        "data.batch_size": 4,
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.num_nodes": 1,
        "trainer.strategy": "auto",
        "trainer.fast_dev_run": "true",
        "trainer.default_root_dir": tmp_path / "run",
    }
    if written["data"]["source"] != "icons":
        shard = write_shard(tmp_path / "a.tar", range(8))
        options |= {"data.source": shard, "data.shards.val": shard, "data.shards.test": shard}
    changes = [f"--{name}={value}" for name, value in options.items()]
    for command in ("fit", "test", "predict"):
        main([command, f"--config={config}", *changes])
    # fast_dev_run leaves nothing behind.
    assert not (tmp_path / "run").exists()
