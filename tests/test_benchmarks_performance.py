"""docs/performance.md says what the results say, and nothing of what was not measured."""

import copy
import json

import pytest

from benchmarks import performance
from benchmarks.pictures import DRAWN, draw_result
from benchmarks.tables import TABLES

RESULTS = performance.read_results(performance.RESULTS)
PASSES = ("forward", "forward+backward")


def result_of(benchmark):
    return next(x for x in RESULTS.values() if x["benchmark"] == benchmark)


def on_a_gpu(document, **settings):
    document = copy.deepcopy(document)
    document["environment"] |= {"device_type": "cuda", "device": "NVIDIA Test"}
    document["settings"] |= {**performance._SETTINGS[document["benchmark"]], **settings}
    return document


def kernel_cell(seq_len, backend, of_dense, speed, memory, heads=(12, 64)):
    ratios = {
        "flops_over_dense": of_dense,
        "speed_over_usual": speed,
        "memory_over_usual": memory,
    }
    figures = {"median_ms": 1.0, "tflops_per_s": 2.0, "peak_extra_mib": 3.0, "ratios": ratios}
    cell = {"contender": f"dilated, {backend}", "kind": "dilated", "seq_len": seq_len}
    return {
        **cell,
        "num_heads": heads[0],
        "head_dim": heads[1],
        "forward": figures,
        "forward+backward": figures,
    }


def test_page_is_that_of_the_results():
    found = performance.PAGE.read_text(encoding="utf-8")
    assert found == performance.page(RESULTS), "run `python -m benchmarks.performance`"


def test_results_of_every_programme_are_there_with_pictures():
    assert {x["benchmark"] for x in RESULTS.values()} >= set(performance.QUESTIONS)
    for name, document in RESULTS.items():
        if document["benchmark"] in DRAWN:
            for suffix in (".svg", ".png"):
                assert (performance.RESULTS / f"{name}{suffix}").exists()
    assert set(TABLES) == set(performance.QUESTIONS)


def test_results_of_a_cpu_answer_no_question_about_a_gpu():
    only_cpu = {name: x for name, x in RESULTS.items() if x["environment"]["device_type"] == "cpu"}
    page = performance.page(only_cpu)
    for goal, _, _ in performance.GOALS:
        assert f"| {goal} | not measured |" in page


def test_goals_are_answered_by_the_worst_size_of_the_best_backend():
    cpu = result_of("kernels")
    document = on_a_gpu(cpu)
    document["cells"] = [
        kernel_cell(65536, "triton", of_dense=0.9, speed=5.0, memory=0.2),
        kernel_cell(65536, "sdpa", of_dense=0.4, speed=2.0, memory=0.3),
        kernel_cell(2**20, "triton", of_dense=0.7, speed=4.0, memory=0.25),
        {"contender": "x", "kind": "dilated", "reason": "none", "seq_len": 1, "num_heads": 1}
        | {"head_dim": 1},
        # Of a size that is not asked for.
        kernel_cell(2**12, "triton", of_dense=0.1, speed=0.1, memory=9.0),
    ]
    goals = performance._goals({"kernels-gpu": document})
    assert all(line.endswith("| 2 of 4 sizes |") for line in goals[-7:-3])
    document["cells"] += [
        kernel_cell(n, "triton", of_dense=0.8, speed=6.0, memory=0.1, heads=(16, 128))
        for n in (65536, 2**20)
    ]
    goals = performance._goals({"kernels-gpu": document})
    assert [line.split(" | ")[-1] for line in goals[-7:-3]] == [
        "0.70 |",
        "0.70 |",
        "4.00 |",
        "0.25 |",
    ]
    assert all("not measured" in line for line in goals[-3:])
    for other in ({"dtype": "float32"}, {"segment_lengths": [2048]}, {"dilation_rates": [1]}):
        goals = performance._goals({"kernels-gpu": on_a_gpu(document, **other)})
        assert all("not measured" in line for line in goals[-7:])


@pytest.mark.parametrize(
    ("passed", "seq_len", "row"), [(PASSES[0], 2**24, -3), (PASSES[1], 2**22, -2)]
)
def test_the_longest_sequences_are_goals(passed, seq_len, row):
    cpu = result_of("length")
    document = on_a_gpu(cpu)
    document["cells"] = [{"pass": passed, "seq_len": seq_len, "median_ms": 1234.0}]
    assert performance._goals({"length": document})[row].endswith("| 1.23 s |")
    other = on_a_gpu(document, num_heads=2)
    assert performance._goals({"length": other})[row].endswith("| not measured |")
    document["cells"] = [{"pass": passed, "seq_len": seq_len, "reason": "out of memory"}]
    assert performance._goals({"length": document})[row].endswith("| not measured |")


def test_a_million_tokens_are_a_goal():
    cpu = result_of("models")
    document = on_a_gpu(cpu)
    cell = {"model": "longnet_lm_base", "tokens_per_s": 5e5, "peak_extra_mib": 9e4}
    document["cells"] = [{**cell, "tokens": 2**16}]
    assert performance._goals({"models": document})[-1].endswith("| not measured |")
    document["cells"] = [{**cell, "tokens": 2**20}]
    assert performance._goals({"models": document})[-1].endswith("500,000 tokens/s, 90,000 MiB |")
    shallow = on_a_gpu(document, num_layers=2)
    assert performance._goals({"models": shallow})[-1].endswith("| not measured |")


@pytest.mark.parametrize("benchmark", ["kernels", "length", "models", "bench"])
def test_a_result_without_cells_has_no_table(benchmark):
    document = {**result_of(benchmark), "cells": []}
    page = performance.page({"new": document})
    assert page.count("No cell is finished.") == 1
    if benchmark in performance._SETTINGS:
        page = performance.page({"new": on_a_gpu(document)})
        assert all(f"| {goal} | not measured |" in page for goal, _, _ in performance.GOALS)


def test_files_are_read_without_those_of_dry_runs(tmp_path):
    text = json.dumps(result_of("models"))
    (tmp_path / "models-gpu.json").write_text(text)
    (tmp_path / "models-dry.json").write_text("{")
    assert list(performance.read_results(tmp_path)) == ["models-gpu"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "JSONDecodeError"), ("[]", "TypeError"), ('{"benchmark": "models"}', "KeyError")],
)
def test_a_broken_file_is_named(text, message, tmp_path):
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"x\.json must hold JSON .* got {message}: .*Remove it"):
        performance.read_results(tmp_path)
    with pytest.raises(ValueError, match=r"x\.json must hold JSON"):
        draw_result(file)


def test_memory_saving_names_its_chunks():
    document = copy.deepcopy(result_of("models"))
    document["cells"][0] |= {"mode": "memory saving", "chunk_size": 1024}
    assert "tokens, memory saving by 1,024 tokens | " in performance.page({"models": document})


def test_what_did_not_run_and_what_stopped_early_is_said():
    cpu = result_of("kernels")
    document = copy.deepcopy(cpu)
    document["is_complete"] = False
    document["cells"].append({**document["cells"][0], "contender": "new", "reason": "too slow"})
    page = performance.page({"kernels-cpu": document})
    assert "- new: too slow" in page
    assert ", stopped early |" in page
    assert page.count("Not measured.") == len(performance.QUESTIONS) - 1


def test_pictures_of_what_was_measured(tmp_path):
    for name, document in RESULTS.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(document))
        written = draw_result(path)
        assert bool(written) == (document["benchmark"] in DRAWN)
        assert all(path.stat().st_size > 5000 for path in written)
    kernels = result_of("kernels")
    path = tmp_path / "nothing.json"
    path.write_text(json.dumps({**kernels, "cells": [{"reason": "none"}]}))
    assert draw_result(path) == ()
