"""The configurations of the captioning recipe parse, run at tiny size and say how they are run."""

from pathlib import Path

import pytest
import yaml

import longnet_zoo as lz
from recipes.captioning import main
from tests.recipes.captioning_runs import TINY, write_shard, write_table
from tests.recipes.test_configs import write_tokenizer

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "captioning").rglob("*.yaml"))


def test_there_are_the_configs_that_are_known():
    names = {config.name for config in CONFIGS}
    assert names == {"quickstart.yaml", "longnet_beit3_base_shards.yaml"}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_header_says_how_to_run_it_on_what_and_what_comes_out(config):
    header = config.read_text().split("\n\n", 1)[0]
    assert all(line.startswith("#") for line in header.splitlines())
    path = config.relative_to(ROOT).as_posix()
    assert f"python -m recipes.captioning fit --config {path}" in header
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
def test_the_longest_segment_reaches_from_the_image_over_the_text(config):
    """Otherwise the text would see no image, or a part of it."""
    model = yaml.safe_load(config.read_text())["model"]
    made = lz.model_info(model["model_name"]).config.changed(model["model_options"])
    assert made.segment_lengths[-1] > made.num_patches + made.max_text_len
    assert not made.pattern.is_dense
    assert max(made.dilation_rates) > 1


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_runs_at_tiny_size(config, tmp_path):
    written = yaml.safe_load(config.read_text())
    options = {f"model.model_options.{name}": x for name, x in TINY.items()}
    if written["data"]["source"] == "icons":
        options["data.source"] = write_table(tmp_path / "table")
    else:
        vocab_size = write_tokenizer(tmp_path / "tokenizer.json")
        # One more, which pads.
        options |= {
            "data.source": write_shard(tmp_path / "train.tar"),
            "data.shards.val": write_shard(tmp_path / "val.tar"),
            "data.shards.test": write_shard(tmp_path / "test.tar"),
            "data.tokenizer": tmp_path / "tokenizer.json",
            "model.model_options.vocab_size": vocab_size + 1,
        }
    options |= {
        "model.max_new_tokens": 5,
        "data.batch_size": 4,
        "data.num_workers": 0,
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.strategy": "auto",
        "trainer.precision": 32,
        "trainer.fast_dev_run": "true",
        "trainer.default_root_dir": tmp_path / "run",
    }
    changes = [f"--{name}={value}" for name, value in options.items()]
    for command in ("fit", "test", "predict"):
        main([command, f"--config={config}", *changes])
    # fast_dev_run leaves nothing behind.
    assert not (tmp_path / "run").exists()
