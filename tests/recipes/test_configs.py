"""Every YAML parses against its recipe and runs, made tiny from the command line."""

import importlib
import json
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml

import longnet_zoo as lz
from longnet_zoo.open_data import OPEN_DATA
from recipes.sequence_parallel import SequenceParallelStrategy
from recipes.token_file_writer import write_token_files
from tests.recipes.text_runs import model_options, write_corpus

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "text").rglob("*.yaml"))
RECIPES = ("recipes.text_lm", "recipes.text_mlm", "recipes.token_file")


def recipe_of(config):
    """Returns the module that the command in the header runs."""
    header = config.read_text().split("\n\n", 1)[0]
    path = config.relative_to(ROOT).as_posix()
    (name,) = re.findall(rf"python -m (\S+) fit --config {re.escape(path)}(?: |$)", header, re.M)[
        :1
    ]
    assert name in RECIPES
    return importlib.import_module(name)


def write_tokenizer(path):
    """Writes a byte-level tokenizer.json with an end-of-document and a mask token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["def value(self): return index"], trainer)
    tokenizer.save(str(path))
    return tokenizer.get_vocab_size()


def write_table(path, column):
    """Writes the tiny corpus as a .jsonl table."""
    texts = [file.read_text() for file in sorted(write_corpus(path.parent / "files").iterdir())]
    path.write_text("\n".join(json.dumps({column: text}) for text in texts))
    return path


def write_genome(path):
    """Writes one line of 4,000 bases."""
    path.write_text("".join(random.Random(path.name).choices("ACGT", k=4000)))
    return path


def test_there_are_the_configs_that_the_readme_names():
    assert {config.name for config in CONFIGS} == {
        "quickstart.yaml",
        "genome.yaml",
        "longnet_base_stack.yaml",
        "mlm_quickstart.yaml",
        "mlm_base.yaml",
        "pretrain_pystdlib.yaml",
        "sequence_parallel_cpu.yaml",
        "sequence_parallel_node.yaml",
        "sequence_parallel_nodes.yaml",
    }


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_header_says_how_to_run_it_on_what_and_what_comes_out(config):
    header = config.read_text().split("\n\n", 1)[0]
    assert all(line.startswith("#") for line in header.splitlines())
    recipe_of(config)
    for heading in ("Hardware", "Expected time", "Expected result"):
        assert f"# {heading} " in header


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_parses_as_it_is(config, capsys):
    with pytest.raises(SystemExit) as stop:
        recipe_of(config).main(["fit", f"--config={config}", "--print_config"])
    assert stop.value.code == 0
    written, parsed = yaml.safe_load(config.read_text()), yaml.safe_load(capsys.readouterr().out)
    for name, value in written["model"]["model_options"].items() if _options(written) else []:
        assert parsed["model"]["model_options"][name] == value
    assert parsed["trainer"]["max_steps"] == written["trainer"]["max_steps"]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_runs_at_tiny_size(config, tmp_path):
    written = yaml.safe_load(config.read_text())["data"]
    options, data = model_options(), {"seq_len": 64}
    corpus = {"source": str(write_corpus(tmp_path / "corpus")), "val_fraction": 0.2}
    if "train" in written:
        write_token_files(folder=str(tmp_path), **corpus)
        data |= {split: tmp_path / f"{split}.npy" for split in ("train", "val")}
    else:
        data |= {**corpus, "test_fraction": 0.1}
    if written.get("streaming"):
        column = written.get("column", "text")
        data["source"] = write_table(tmp_path / "table.jsonl", column)
    if "test_source" in written:
        data["source"] = write_genome(tmp_path / "one.txt")
        data["test_source"] = write_genome(tmp_path / "other.txt")
    if "tokenizer" in written:
        data["tokenizer"] = tmp_path / "tokenizer.json"
        options["vocab_size"] = write_tokenizer(data["tokenizer"])
    changes = [f"--data.{name}={value}" for name, value in data.items()]
    changes += [f"--model.model_options.{name}={value}" for name, value in options.items()]
    trainer = {"accelerator": "cpu", "devices": 1, "strategy": "auto", "precision": "32-true"}
    trainer["num_nodes"] = 1
    changes += [f"--trainer.{name}={value}" for name, value in trainer.items()]
    changes += ["--trainer.fast_dev_run=true", f"--trainer.default_root_dir={tmp_path / 'run'}"]
    recipe = recipe_of(config)
    for command in ("fit", "validate", *(["test"] if "test_source" in written else [])):
        recipe.main([command, f"--config={config}", *changes])
    # fast_dev_run leaves nothing behind.
    assert not (tmp_path / "run").exists()


def test_genome_config_reads_the_data_sets_that_its_header_fetches():
    text = (ROOT / "configs/text/genome.yaml").read_text()
    (names,) = re.findall(r"^#   longnet-zoo data (.+)$", text, re.M)
    data = yaml.safe_load(text)["data"]
    assert [data["source"], data["test_source"]] == [f"data/{name}" for name in names.split()]
    assert set(names.split()) <= set(OPEN_DATA)


def test_base_config_is_the_papers_table():
    config = yaml.safe_load((ROOT / "configs/text/longnet_base_stack.yaml").read_text())
    model, trainer, data = config["model"], config["trainer"], config["data"]
    optimization = model["optimization"]
    # arXiv 2307.02486, Table 3 and Sec. 4.2.
    assert optimization["lr"] == 6e-4
    assert optimization["betas"] == [0.9, 0.98]
    assert optimization["warmup_steps"] == 750
    assert optimization["weight_decay"] == 0.01
    assert optimization["decay"] == "polynomial"
    assert trainer["max_steps"] == 300_000
    assert trainer["gradient_clip_val"] == 2.0
    batch = data["seq_len"] * data["batch_size"] * trainer["devices"]
    assert batch * trainer["accumulate_grad_batches"] == 2**19
    with torch.device("meta"):
        built = lz.create_model(model["model_name"], **model["model_options"]).config
    assert (built.num_layers, built.embed_dim, built.num_heads, built.ffn_dim) == (
        *(12, 768, 12),
        3072,
    )
    assert built.segment_lengths == (2048, 4096, 8192, 16384, 32768)
    assert built.dilation_rates == (1, 2, 4, 6, 12)
    assert built.dropout == 0.0


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_processes_of_a_config_fill_its_grid(config):
    written = yaml.safe_load(config.read_text())
    trainer, strategy = written["trainer"], written["trainer"].get("strategy")
    if isinstance(strategy, dict):
        options = strategy["init_args"]
        world_size = trainer["devices"] * trainer.get("num_nodes", 1)
        assert SequenceParallelStrategy(**options | {"timeout": None})._grid_shape(world_size)
        assert written["data"]["seq_len"] % options["sequence_parallel_size"] == 0


def test_the_submission_file_runs_a_config_with_restarts():
    text = (ROOT / "configs/cluster/sequence_parallel.sbatch").read_text()
    (config,) = re.findall(r"^    --config (\S+)", text, re.M)
    trainer = yaml.safe_load((ROOT / config).read_text())["trainer"]
    assert f"#SBATCH --nodes={trainer['num_nodes']}\n" in text
    assert f"--nproc-per-node {trainer['devices']} " in text
    assert "--ckpt_path last" in text
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in text
    # Processes are killed after saving, and before SLURM ends the job.
    (time_left,) = re.findall(r"^#SBATCH --signal=B:USR1@(\d+)$", text, re.M)
    (time_to_save,) = re.findall(r"^export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)$", text, re.M)
    assert int(time_to_save) < int(time_left)
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


@pytest.mark.parametrize(("is_late", "status"), [(True, 1), (True, 0), (False, 1)])
def test_a_submitted_run_goes_back_into_the_queue_if_its_time_is_over(tmp_path, is_late, status):
    # What SLURM does: srun runs until scancel reaches it, or fails by itself.
    ending = f"while [ ! -e stopped ]; do sleep 0.02; done; exit {status}" if is_late else "exit 1"
    commands = {
        "srun": f"touch running; {ending}",
        "scancel": 'echo "$@" > stopped',
        "scontrol": '[ "$1" = requeue ] && echo "$2" > requeued || echo node0',
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    env = {"PATH": path, "SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "node0"}
    script = ["bash", str(ROOT / "configs/cluster/sequence_parallel.sbatch")]
    with subprocess.Popen(script, cwd=tmp_path, env=env) as run:
        while is_late and run.poll() is None and not (tmp_path / "running").exists():
            time.sleep(0.02)
        if is_late:
            run.send_signal(signal.SIGUSR1)
        assert run.wait(timeout=20) == status
    assert not is_late or (tmp_path / "stopped").read_text() == "--signal=TERM 7\n"
    requeued = [path.read_text() for path in tmp_path.glob("requeued")]
    assert requeued == ["7\n"] * (is_late and status == 1)


def _options(written):
    return written["model"].get("model_options")
