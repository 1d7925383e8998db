import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import models
from benchmarks.record import Crash
from longnet_zoo.factory import create_model
from longnet_zoo.layers import MemorySaving

ARGUMENTS = "--device cpu --rounds 1 --num-layers 1"
TEXT = "longnet_lm_tiny:64"


def run(*extra):
    return models.main(models.read_options([*ARGUMENTS.split(), *map(str, extra)]))


@pytest.mark.parametrize(
    ("case", "num_tokens"), [(TEXT, 64), ("longvit_tiny_patch8_64:32", 16)], ids=["text", "vision"]
)
def test_every_mode_of_a_model_has_a_cell(case, num_tokens, tmp_path):
    output = tmp_path / "models.json"
    assert run("--cases", case, "--output", output) == 0
    cells = json.loads(output.read_text())["cells"]
    assert [cell["mode"] for cell in cells] == ["plain", "checkpointing", "memory saving"]
    plain = cells[0]
    for cell in cells:
        assert cell["tokens"] == num_tokens
        assert cell["tokens_per_s"] == pytest.approx(1000 * num_tokens / cell["median_ms"], 1e-3)
        assert cell["peak_extra_mib"] > 0
        assert cell["ratios"]["over"] == "plain"
        assert cell.get("chunk_size") == (256 if cell["mode"] == "memory saving" else None)
        assert cell["ratios"]["time_over"] == pytest.approx(
            cell["median_ms"] / plain["median_ms"], 1e-3
        )


def test_finished_modes_are_not_run_again(tmp_path, monkeypatch):
    output = tmp_path / "models.json"
    run("--cases", TEXT, "--output", output)
    before = json.loads(output.read_text())
    monkeypatch.setattr(models, "measure", None)
    run("--cases", TEXT, "--output", output, "--resume")
    assert json.loads(output.read_text())["cells"] == before["cells"]


def test_a_mode_that_disagrees_is_not_timed(tmp_path, monkeypatch):
    def break_model(model, num_tokens):
        with torch.no_grad():
            next(model.parameters()).mul_(1.5)

    monkeypatch.setitem(models.MODES, "checkpointing", break_model)
    output = tmp_path / "models.json"
    arguments = ("--cases", TEXT, "--modes", "plain", "checkpointing", "--output", output)
    assert run(*arguments) == 1
    cells = {cell["mode"]: cell for cell in json.loads(output.read_text())["cells"]}
    assert cells["checkpointing"]["reason"].startswith("wrong: loss and gradient norm are (")
    assert "tokens_per_s" in cells["plain"]


def test_disagreement_is_relative_and_sees_nan():
    models.check_agreement((1.00005, 2.0), (1.0, 2.0), "float32")
    with pytest.raises(ArithmeticError, match=r"wrong: .* are \(1\.1, 2\.0\), those"):
        models.check_agreement((1.1, 2.0), (1.0, 2.0), "float32")
    with pytest.raises(ArithmeticError, match=r"are \(nan, 2\.0\)"):
        models.check_agreement((float("nan"), 2.0), (1.0, 2.0), "bfloat16")


@pytest.mark.parametrize("stage", ["loss_and_grad_norm", "peak_extra_mib"])
def test_out_of_memory_is_a_reason_and_the_next_mode_runs(stage, tmp_path, monkeypatch):
    work, calls = getattr(models, stage), []

    def exhaust(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return work(*arguments)

    monkeypatch.setattr(models, stage, exhaust)
    output = tmp_path / "models.json"
    assert run("--cases", TEXT, "--modes", "plain", "checkpointing", "--output", output) == 0
    plain, checkpointing = json.loads(output.read_text())["cells"]
    assert plain["reason"] == "out of memory"
    assert checkpointing["ratios"]["over"] == "checkpointing"


def test_a_broken_device_ends_the_run_with_the_reason_on_disk(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA error: misaligned address\nmore")

    monkeypatch.setattr(models, "loss_and_grad_norm", fail)
    output = tmp_path / "models.json"
    with pytest.raises(Crash, match=f"plain of {TEXT} broke the device: CUDA error: misal"):
        run("--cases", TEXT, "--output", output)
    (cell,) = json.loads(output.read_text())["cells"]
    assert cell["reason"] == "CUDA error: misaligned address"


def test_a_step_trains_and_leaves_no_gradients():
    model = create_model("longnet_lm_tiny", num_layers=1)
    loss_of, num_tokens = models.make_loss(model, "text", 32, torch.device("cpu"))
    assert num_tokens == 32
    step = models.make_step(model, loss_of, "float32")
    before = loss_of().item()
    for _ in range(3):
        step()
    assert loss_of().item() < before
    assert all(weight.grad is None for weight in model.parameters())


def test_slides_have_a_loss_of_all_tiles():
    model = create_model("gigapath_slide_enc12l768d", num_layers=1, embed_dim=48, num_heads=4)
    loss_of, num_tokens = models.make_loss(model, "slide", 50, torch.device("cpu"))
    assert num_tokens == 50
    assert loss_of().isfinite()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("longnet_lm_tiny", "SIZE of at least 1, got 'longnet_lm_tiny'"),
        ("longnet_lm_tiny:0", "SIZE of at least 1, got 'longnet_lm_tiny:0'"),
        ("longvit_tiny_patch8_64:x", "SIZE of at least 1, got 'longvit_tiny_patch8_64:x'"),
        ("longvit_tiny_patch8_64:9", "img_size"),
        ("longnet_beit3_tiny:64", "got 'longnet_beit3_tiny:64' of vision-language"),
        ("nosuch:64", "under the name 'nosuch'"),
    ],
)
def test_wrong_cases_are_refused_before_anything_is_measured(case, message, monkeypatch):
    monkeypatch.setattr(models, "measure", None)
    with pytest.raises(ValueError, match=message):
        run("--cases", TEXT, case)


@pytest.mark.parametrize(("num_tokens", "size"), [(64, 256), (4096, 1024), (2**20, 4096)])
def test_memory_saving_has_several_chunks_of_a_long_sequence(num_tokens, size):
    given = []
    model = SimpleNamespace(set_memory_saving=given.append)
    models.MODES["memory saving"](model, num_tokens)
    assert given == [MemorySaving(chunk_size=size)]
