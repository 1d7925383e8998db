"""Every YAML of fine-tuning parses and runs, made tiny from the command line."""

import inspect
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from longnet_zoo import DilatedPattern
from recipes.finetune_lora import main
from recipes.finetune_lora_quickstart import make_quickstart
from tests.recipes.finetune_runs import TOY, save_toy, write_other_text
from tests.recipes.test_configs import write_table, write_tokenizer

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "finetune").rglob("*.yaml"))
QUICKSTART, CLUSTER = (
    ROOT / "configs/finetune" / name for name in ("quickstart.yaml", "qwen_7b_128k.yaml")
)
# Of the config.json of Qwen/Qwen2.5-7B.
QWEN_7B = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}


def header_of(config):
    return config.read_text().split("\n\n", 1)[0]


def test_there_are_the_configs_that_the_readme_names():
    assert {config.name for config in CONFIGS} == {"quickstart.yaml", "qwen_7b_128k.yaml"}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_header_says_how_to_run_it_on_what_and_what_comes_out(config):
    header = header_of(config)
    assert all(line.startswith("#") for line in header.splitlines())
    path = config.relative_to(ROOT).as_posix()
    assert f"python -m recipes.finetune_lora fit --config {path}" in header
    run_dir = yaml.safe_load(config.read_text())["trainer"]["default_root_dir"]
    assert f"recipes.finetune_lora_merge --adapter {run_dir}/adapter --output merged" in header
    for heading in ("Hardware", "Expected time", "Expected result"):
        assert f"# {heading} " in header


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_parses_as_it_is(config, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--config={config}", "--print_config"])
    assert stop.value.code == 0
    written, parsed = yaml.safe_load(config.read_text()), yaml.safe_load(capsys.readouterr().out)
    for name, value in written["model"].get("model_options", {}).items():
        assert parsed["model"]["model_options"][name] == value
    pattern = written["model"]["pattern"]
    assert pattern.items() <= parsed["model"]["pattern"].items()
    assert DilatedPattern(**pattern).segment_lengths[-1] == written["data"]["seq_len"]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_runs_at_tiny_size(config, tmp_path):
    written = yaml.safe_load(config.read_text())
    data = {"seq_len": 48, "val_fraction": 0.2, "test_fraction": 0.1}
    sizes = dict(TOY)
    if "tokenizer" in written["data"]:
        data["source"] = write_table(tmp_path / "table.jsonl", "text")
        data["tokenizer"] = tmp_path / "tokenizer.json"
        sizes["vocab_size"] = write_tokenizer(data["tokenizer"])
    else:
        data["source"] = write_other_text(tmp_path / "text")
    base = save_toy(Qwen2ForCausalLM, Qwen2Config(**sizes), tmp_path / "base")
    changes = [f"--data.{name}={value}" for name, value in data.items()]
    trainer = {"accelerator": "cpu", "devices": 1, "strategy": "auto", "precision": "32-true"}
    changes += [f"--trainer.{name}={value}" for name, value in trainer.items()]
    changes += ["--trainer.fast_dev_run=true", f"--trainer.default_root_dir={tmp_path / 'run'}"]
    for command in ("fit", "validate", "test"):
        main([command, f"--config={config}", f"--model.model_name={base}", *changes])
    # fast_dev_run leaves nothing behind.
    assert not (tmp_path / "run").exists()


def test_quickstart_reads_what_its_header_makes():
    header, written = header_of(QUICKSTART), yaml.safe_load(QUICKSTART.read_text())
    assert "#   python -m recipes.finetune_lora_quickstart\n" in header
    options = inspect.signature(make_quickstart).parameters
    folder = options["folder"].default
    assert written["model"]["model_name"] == f"{folder}/model"
    assert written["data"]["source"] == f"{folder}/prose"
    assert written["data"]["seq_len"] == options["seq_len"].default


def test_memory_of_the_cluster_config_adds_up():
    written = yaml.safe_load(CLUSTER.read_text())
    lines = re.findall(r"^# {2,4}([\d.]+) +(\S.*)$", header_of(CLUSTER), re.M)
    *parts, (total, _) = [(float(gigabytes), text) for gigabytes, text in lines]
    assert sum(gigabytes for gigabytes, _ in parts) == pytest.approx(total, abs=0.5)
    assert total < 80 * 0.9
    weights, adapters, kept = (gigabytes for gigabytes, _ in parts[:3])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen2Config(**QWEN_7B))
    assert weights == pytest.approx(2e-9 * model.num_parameters(), abs=0.05)
    layers = model.model.layers
    linear = [part for part in layers.modules() if isinstance(part, torch.nn.Linear)]
    rank = written["model"]["lora"]["rank"]
    num_adapted = sum(rank * (part.in_features + part.out_features) for part in linear)
    # Weights, gradients, and two means of Adam, 4 bytes each.
    assert adapters == pytest.approx(16e-9 * num_adapted, abs=0.05)
    num_kept = written["data"]["seq_len"] * QWEN_7B["hidden_size"] * len(layers)
    assert kept == pytest.approx(2e-9 * num_kept, abs=0.05)


def test_positions_of_the_cluster_config_reach_its_context():
    written = yaml.safe_load(CLUSTER.read_text())
    options, seq_len = written["model"]["model_options"], written["data"]["seq_len"]
    positions = options["rope_parameters"]
    stretched = positions["factor"] * positions["original_max_position_embeddings"]
    assert stretched == options["max_position_embeddings"] == seq_len
    # Two windows of validation for each device.
    windows = written["data"]["streaming"]["eval_tokens"] // seq_len
    trainer = written["trainer"]
    assert windows == trainer["devices"] * trainer["limit_val_batches"]
