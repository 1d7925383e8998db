import json
import math
import sysconfig
from pathlib import Path

import pytest
import torch

from benchmarks import streaming
from benchmarks.performance import page
from benchmarks.pictures import draw_result
from benchmarks.record import Crash
from longnet_zoo.ops.kept_keys import KeptKeys

ARGUMENTS = (
    "--device cpu --segment-lengths 16 64 --dilation-rates 1 4 --rounds 1 --num-bytes 300 "
    "--chunk-sizes 64 50 --positions 40 10 --uncached-positions 10 --score-bytes 200"
)


def options_of(*extra):
    return streaming.read_options([*ARGUMENTS.split(), *map(str, extra)])


def run(*extra):
    return streaming.main(options_of(*extra))


def make_model(*extra):
    return streaming.make_model(options_of(*extra), "float32", torch.device("cpu"))


def cells_of(document, part):
    return [cell for cell in document["cells"] if cell["part"] == part]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    output = tmp_path_factory.mktemp("streaming") / "streaming-test.json"
    assert run("--output", output) == 0
    return output


def test_reading_is_seen_at_powers_of_two(result):
    cells = cells_of(json.loads(result.read_text()), "reading")
    expected = [(size, position) for size in (50, 64) for position in (64, 128, 256, 300)]
    assert [(cell["chunk_size"], cell["position"]) for cell in cells] == expected
    for cell in cells:
        assert cell["tokens_per_s"] > 0
        assert cell["resident_mib"] > 100
        assert 1 <= cell["ratios"]["most_over_first"] < 1.05
    # Nothing is kept where all segments end; 300 is no such place.
    by_64 = [cell["cache_mib"] for cell in cells if cell["chunk_size"] == 64]
    assert by_64[:3] == [0, 0, 0]
    assert by_64[3] > 0
    assert all(cell["cache_mib"] > 0 for cell in cells if cell["chunk_size"] == 50)


def test_growth_shows_in_the_last_row(monkeypatch):
    # After each chunk of 50 but the first, which ends before the first segment of 64 does.
    mib = iter([110.0, 120.0, 150.0, 130.0, 121.0])
    monkeypatch.setattr(streaming, "resident_mib", lambda device: next(mib))
    cells = streaming.measure_reading(make_model(), streaming.library_bytes(300), 50, 100.0)
    assert [cell["resident_mib"] for cell in cells] == [110, 120, 121, 121]
    assert cells[0]["extra_mib"] == 10
    assert cells[0]["ratios"]["most_over_first"] == 1
    assert cells[-1]["ratios"]["most_over_first"] == pytest.approx(150 / 110)


def test_writing_is_timed_after_each_position(result):
    cells = cells_of(json.loads(result.read_text()), "writing")
    assert [(x["is_cached"], x["position"]) for x in cells] == [(True, 10), (True, 40), (False, 10)]
    for cell in cells:
        ratio = cell["median_ms"] / cells[0]["median_ms"]
        assert cell["ratios"]["time_over_shortest"] == pytest.approx(ratio, 1e-3)
        assert 0 < cell["low_ms"] <= cell["median_ms"] <= cell["high_ms"]


@torch.no_grad()
def test_caches_have_read_what_comes_before_a_position():
    model = make_model()
    tokens = torch.randint(256, (1, 150))
    caches = streaming.read_to(model, tokens, [130, 7])
    assert {position: cache.lengths for position, cache in caches.items()} == {7: [7], 130: [130]}
    whole = model(tokens)
    for position, cache in caches.items():
        found = model(tokens[:, position : position + 1], cache=cache)
        torch.testing.assert_close(found[:, 0], whole[:, position])


@torch.no_grad()
def test_a_token_is_written_from_the_logits_of_the_last(monkeypatch):
    model = make_model()
    tokens = torch.randint(256, (1, 30))
    given = []
    monkeypatch.setattr(streaming, "draw_tokens", lambda *arguments: given.append(arguments))
    streaming.write_without_cache(model, tokens)
    ((logits, sampling),) = given
    torch.testing.assert_close(logits, model(tokens)[:, -1])
    assert sampling.temperature == 1


def test_score_of_chunks_is_that_of_one_pass(result):
    whole, *others = cells_of(json.loads(result.read_text()), "score")
    assert [whole["way"], *(x["way"] for x in others)] == [
        "one pass",
        "chunks of 50",
        "chunks of 64",
    ]
    model = make_model()
    text = streaming.library_bytes(200)
    inputs = torch.tensor([[streaming.TOKENIZER.eod_id, *text[:-1]]])
    with torch.no_grad():
        nats = model.loss(inputs, torch.tensor([list(text)]), reduction="sum").item()
    assert whole["bits_per_byte"] == pytest.approx(nats / math.log(2) / 200, 1e-4)
    assert whole["difference"] == 0
    for cell in others:
        assert cell["num_bytes"] == 200
        assert abs(cell["difference"]) < 1e-5
        assert cell["ratios"]["memory_over_one_pass"] == pytest.approx(
            cell["peak_extra_mib"] / whole["peak_extra_mib"], 1e-3
        )
        assert cell["peak_extra_mib"] < whole["peak_extra_mib"]


def test_another_score_shows_as_a_difference(monkeypatch):
    monkeypatch.setattr(streaming, "_bits_in_chunks", lambda *_: torch.ones(9).sum().item())
    whole, chunks = streaming.measure_score(make_model(), streaming.library_bytes(200), [50])
    assert chunks["bits_per_byte"] == 9
    assert chunks["difference"] == 9 - whole["bits_per_byte"]


def test_finished_parts_are_not_run_again(result, tmp_path, monkeypatch):
    document = json.loads(result.read_text())
    output = tmp_path / "streaming.json"
    kept = [cell for cell in document["cells"] if cell.get("chunk_size") == 50]
    output.write_text(json.dumps({**document, "cells": kept}))
    run_parts = []
    for name in ("reading", "writing", "score"):
        monkeypatch.setattr(
            streaming,
            f"measure_{name}",
            lambda model, text, size, *_, name=name: run_parts.append((name, size)) or [],
        )
    monkeypatch.setattr(streaming, "line_of", str)
    run("--output", output, "--resume")
    assert [name for name, _ in run_parts] == ["reading", "writing", "score"]
    assert run_parts[0] == ("reading", 64)
    assert json.loads(output.read_text())["cells"] == kept


@pytest.mark.parametrize(
    ("error", "reason", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory", 0),
        (RuntimeError("no kernel\nmore"), "no kernel", 1),
    ],
)
def test_an_error_is_the_reason_and_the_other_parts_run(error, reason, code, tmp_path, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(streaming, "measure_writing", fail)
    output = tmp_path / "streaming.json"
    assert run("--output", output) == code
    document = json.loads(output.read_text())
    assert cells_of(document, "writing") == [{"part": "writing", "reason": reason}]
    assert len(cells_of(document, "score")) == 3
    assert f"- writing: {reason}" in page({"streaming-test": document})


def test_a_broken_device_ends_the_run(monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA error: misaligned address")

    monkeypatch.setattr(streaming, "measure_reading", fail)
    with pytest.raises(Crash, match="reading broke the device: CUDA error: misaligned"):
        run()


def double_kept_values(keys, rows, heads, num_rows, real=KeptKeys.kept):
    k, v = real(keys, rows, heads, num_rows)
    return k, 2 * v


@pytest.mark.parametrize(
    ("method", "wrong"), [("kept", double_kept_values), ("join_step", lambda *_, **__: None)]
)
def test_a_wrong_stream_is_not_timed(method, wrong, monkeypatch, capsys):
    monkeypatch.setattr(KeptKeys, method, wrong)
    assert run() == 1
    assert "not timed: features in chunks are off by" in capsys.readouterr().out


def test_text_is_the_standard_library_in_order():
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [x for x in sorted(root.rglob("*.py")) if "site-packages" not in x.parts]
    start = b"".join(file.read_bytes() for file in files[:9])
    assert streaming.library_bytes(len(start)) == start
    assert streaming.library_bytes(11) == start[:11]


def test_more_text_than_there_is_is_refused(tmp_path, monkeypatch):
    for name in ("a.py", "site-packages/b.py", "dist-packages/c.py", "d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("12345")
    monkeypatch.setattr(streaming.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert streaming.library_bytes(5) == b"12345"
    with pytest.raises(ValueError, match="got 5 in Python files and 1,000 asked for"):
        streaming.library_bytes(1000)


@pytest.mark.parametrize("model", ["longnet_mlm_tiny", "longvit_tiny_patch8_64"])
def test_models_that_do_not_write_are_refused(model):
    with pytest.raises(ValueError, match=f"--model must be a causal model of text, .* '{model}'"):
        run("--model", model)


def test_memory_without_proc_is_the_most_so_far(monkeypatch):
    now_mib = streaming.resident_mib(torch.device("cpu"))

    def fail(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", fail)
    assert streaming.resident_mib(torch.device("cpu")) >= 0.9 * now_mib
    monkeypatch.setattr(streaming.sys, "platform", "darwin")
    assert streaming.resident_mib(torch.device("cpu")) < 0.01 * now_mib


def test_page_and_picture_hold_all_parts(result):
    document = json.loads(result.read_text())
    text = page({"streaming-test": document})
    for cell in document["cells"]:
        if cell["part"] == "reading":
            assert f"| {cell['position']}, by {cell['chunk_size']} | " in text
    for row in ("10, with a cache", "10, one pass each", "200, one pass", "200, chunks of 50"):
        assert f"| {row} | " in text
    assert "streaming-test.svg" in text
    assert all(path.stat().st_size > 5000 for path in draw_result(result))
    only = {**document, "cells": cells_of(document, "score")}
    assert "tokens read" not in page({"streaming-test": only})
