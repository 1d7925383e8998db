import json

import pytest
import torch
import yaml

from benchmarks import pretraining
from benchmarks.performance import page
from longnet_zoo.factory import create_model

OPTIONS = {"embed_dim": 16, "num_layers": 2, "num_heads": 2, "segment_lengths": [128, 512]}
OPTIONS |= {"dilation_rates": [1, 4]}


@pytest.fixture
def run(tmp_path):
    """A run of four steps, logged at every one, validated after the second."""
    (tmp_path / "checkpoints").mkdir()
    warmup = {"start": 128, "steps": 2, "step_tokens": 300}
    optimization = {"lr": 0.01, "optimizer": "muon"}
    model = {"model_name": None, "model_options": OPTIONS, "optimization": optimization}
    config = {
        "trainer": {"precision": "32-true"},
        "data": {"seq_len": 512, "batch_size": 2},
        "model": {**model, "context_warmup": warmup},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    callbacks = {"Throughput": {"train_seconds": 1800.0}, "Other": {}}
    torch.save({"global_step": 4, "callbacks": callbacks}, tmp_path / "checkpoints" / "last.ckpt")
    lines = ["step,train_bits_per_byte,val_bits_per_byte", "0,8.0,", "1,6.0,", "1,,5.5", "2,4.0,"]
    (tmp_path / "metrics.csv").write_text("\n".join([*lines, "3,3.0,", ""]))
    return tmp_path


def test_tokens_and_hours_are_counted(run):
    facts = pretraining.run_document(run)["settings"]
    # Rows of 128, 256 and 512 tokens that hold 300: three, two and one.
    assert facts["tokens"] == 3 * 128 + 2 * 256 + 2 * 512
    assert (facts["steps"], facts["hours"], facts["lr"]) == (4, 0.5, 0.01)
    assert (facts["start"], facts["seq_len"]) == (128, 512)
    assert (facts["model"], facts["segment_lengths"]) == ("longnet_lm_tiny", (128, 512))


def test_flops_are_those_of_the_rows_that_were_read(run):
    document = pretraining.run_document(run)
    model = create_model("longnet_lm_tiny", **OPTIONS)
    expected = 0
    for rows, context in ((3, 128), (2, 256), (1, 512), (1, 512)):
        forward, backward = model.config.pattern.flops(context, 2, 8, is_causal=True)
        expected += rows * (3 * (model.flops(context) - 2 * forward) + 2 * (forward + backward))
    assert document["settings"]["flops"] == document["cells"][-1]["flops"] == expected


def test_dense_attention_costs_more_where_the_context_is_longer_than_a_segment(run):
    dilated = pretraining.run_document(run)["cells"]
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["model_options"] |= {"segment_lengths": [4096], "dilation_rates": [1]}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    dense = pretraining.run_document(run)["cells"]
    assert dense[0]["flops"] <= dilated[0]["flops"]
    assert dense[-1]["flops"] > dilated[-1]["flops"]


def test_without_a_warm_up_every_step_reads_its_windows(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["context_warmup"] = None
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    facts = pretraining.run_document(run)["settings"]
    assert facts["tokens"] == 4 * 2 * 512
    assert facts["start"] == 512


def test_curve_has_the_mean_between_rows_and_every_validation(run, monkeypatch):
    monkeypatch.setattr(pretraining, "NUM_ROWS", 1)
    first, last = pretraining.run_document(run)["cells"]
    assert (first["step"], first["train_bits_per_byte"], first["val_bits_per_byte"]) == (2, 7, 5.5)
    assert (last["step"], last["context"], last["train_bits_per_byte"]) == (4, 512, 3.5)
    assert "val_bits_per_byte" not in last


def test_page_shows_cost_and_curve(run, tmp_path, monkeypatch):
    output = tmp_path / "pretraining-test.json"
    assert pretraining.main(pretraining.read_options([str(run), "--output", str(output)])) == 0
    text = page({"pretraining-test": json.loads(output.read_text())})
    assert "4 steps, 0.0 million tokens" in text
    assert "0.5 hours; muon, learning rate 0.01, 32-true." in text
    assert "| 2 | 256 | 0.0 | " in text
    assert " | 6.000 | 5.500 |" in text


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"finished run of recipes.text_lm, got no .*config.yaml"):
        pretraining.run_document(tmp_path)
