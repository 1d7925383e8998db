"""The report compares base, adapters and merged model; the quickstart has all it needs."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from recipes.finetune_lora import main
from recipes.finetune_lora_quickstart import main as quickstart
from recipes.finetune_lora_quickstart import write_prose
from recipes.text_files import find_files
from tests.recipes.finetune_runs import TOY, arguments, save_toy, write_other_text
from tests.recipes.text_runs import curve, write_corpus

REPORT = "--trainer.callbacks+=recipes.finetune_lora_report.AdapterReport"


@pytest.mark.parametrize("merges", [True, False])
def test_report_compares_base_adapters_and_merged_model(tmp_path, capsys, merges):
    base = save_toy(LlamaForCausalLM, LlamaConfig(**TOY), tmp_path / "base")
    text, run_dir = write_other_text(tmp_path / "text"), tmp_path / "run"
    args = arguments(
        base, text, run_dir, trainer__limit_val_batches=1.0, model__optimization__lr=0.02
    )
    options = ["--trainer.callbacks.max_windows=null", f"--trainer.callbacks.merge={merges}"]
    main(["fit", *args, REPORT, *options])
    metrics = json.loads((run_dir / "metrics.json").read_text())["metrics"]
    before, after = metrics["bits_per_byte_base"], metrics["bits_per_byte_adapter"]
    # The same windows as in validation, and in the figures of all text recipes.
    assert after == pytest.approx(curve(run_dir, "val_bits_per_byte")[5], rel=1e-5)
    assert after == pytest.approx(metrics["context_64"], rel=1e-5)
    assert after < before - 0.05
    said = capsys.readouterr().out
    assert f"base    {before:.4f}\n" in said
    assert f"adapter {after:.4f}  {after - before:+.4f}  {run_dir / 'adapter'}" in said
    assert ("bits_per_byte_merged" in metrics) == merges == (run_dir / "merged").exists()
    if merges:
        assert metrics["bits_per_byte_merged"] == pytest.approx(after, rel=1e-5)
        assert f"merged {metrics['bits_per_byte_merged']:.4f}" in said


def test_report_without_held_out_text_says_so(tmp_path, capsys):
    base = save_toy(LlamaForCausalLM, LlamaConfig(**TOY), tmp_path / "base")
    text = write_other_text(tmp_path / "text")
    main(["fit", *arguments(base, text, tmp_path / "run", data__val_fraction=0.0), REPORT])
    said = capsys.readouterr().out
    assert "No report: there is no held-out text" in said
    assert "base    " not in said


# What the quickstart needs ------------------------------------------------------------------------


def test_quickstart_makes_a_base_that_has_learned_and_the_same_twice(tmp_path, capsys):
    weights = []
    corpus = write_corpus(tmp_path / "code")
    options = ["--steps=40", "--seq_len=64", "--hidden_size=32", "--num_layers=1"]
    for name in ("one", "two"):
        quickstart([f"--folder={tmp_path / name}", f"--source={corpus}", *options])
        weights.append(AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").state_dict())
    said = capsys.readouterr().out
    # A byte at random takes 8 bits.
    assert float(said.split("source code at ")[1].split(" bits")[0]) < 6.0
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert len(list((tmp_path / "one" / "prose").iterdir())) > 50


def test_prose_is_english_and_no_part_of_what_the_base_has_read(tmp_path):
    write_prose(tmp_path)
    files = {path.name: path.read_text("utf-8") for path in tmp_path.iterdir()}
    assert "for" in files["for.txt"]
    assert sum(map(len, files.values())) > 300_000
    assert not any("pydoc_data" in file.key for file in find_files("stdlib"))


def test_options_of_the_quickstart_have_ranges(tmp_path, capsys):
    for option, message in {
        "--hidden_size=48": "hidden_size must be a multiple of 32, got 48",
        "--steps=0": "steps must be 1 or more, got 0",
    }.items():
        with pytest.raises(SystemExit):
            quickstart([f"--folder={tmp_path}", option])
        assert message in capsys.readouterr().err


def test_python_without_its_reference_is_one_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(RuntimeError, match=r"module pydoc_data\.topics .*comes without it"):
        write_prose(tmp_path)
