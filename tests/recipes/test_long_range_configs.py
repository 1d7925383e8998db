"""Every YAML of the long-range tasks parses, says what it does, and runs at tiny size."""

from pathlib import Path

import pytest
import torch
import yaml

from longnet_zoo.long_range import TASKS
from recipes import long_range
from recipes.long_range import LongRange

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs/long_range").glob("*.yaml"))


def read(config):
    return yaml.safe_load(config.read_text())


def test_there_is_a_config_for_every_task_and_one_for_gpus():
    names = {config.stem for config in CONFIGS}
    assert names == {*TASKS, "passkey_128k_node"}
    # The sweep finds them by name.
    assert all(read(config)["model"]["task"] == config.stem.split("_128k")[0] for config in CONFIGS)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_header_says_how_to_run_it_on_what_and_what_comes_out(config):
    header = config.read_text().split("\n\n", 1)[0]
    path = config.relative_to(ROOT).as_posix()
    assert f"#   python -m recipes.long_range fit --config {path}\n" in header
    assert f"longnet-zoo evaluate --task {read(config)['model']['task']}" in header
    for heading in ("Hardware", "Expected time", "Expected result"):
        assert f"# {heading} " in header


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_position_is_seen_by_a_head_in_every_branch(config):
    # A head of rate r takes every r-th position, from its own number on.
    model = read(config)["model"]
    with torch.device("meta"):
        task = LongRange(**{**model, "pretrained": False, "optimization": {"lr": 1e-3}})
    own = task.model.config
    assert max(own.dilation_rates) <= own.num_heads


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_runs_at_tiny_size(config, tmp_path):
    written = read(config)["model"]
    changes = {}
    if not written.get("pretrained"):  # weights have the sizes that they have
        num_heads = written["model_options"]["num_heads"]
        small = {"embed_dim": 2 * num_heads, "num_layers": 1, "num_heads": num_heads}
        changes = {f"model.model_options.{name}": value for name, value in small.items()}
    if "vit" not in written["model_name"]:
        changes["model.seq_len"] = 1024 if written["task"] == "pathfinder" else 512
    changes |= {
        "model.start_len": "null",
        "trainer.fast_dev_run": "true",
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.precision": "32-true",
        "trainer.strategy": "auto",
        "trainer.default_root_dir": tmp_path,
        "data.batch_size": 1,
        "data.num_workers": 0,
    }
    long_range.main(
        ["fit", f"--config={config}", *(f"--{name}={value}" for name, value in changes.items())]
    )
    assert not list(tmp_path.iterdir())
