import json

import pytest
import torch

from benchmarks import dilated_attention as benchmark
from benchmarks.measure import alternate, peak_extra_mib
from benchmarks.pipelines import usual_pipeline
from longnet_zoo.ops import DilatedPattern
from longnet_zoo.ops.reference import dilated_attention_reference


def test_usual_pipeline_gives_the_right_output():
    pattern = DilatedPattern(segment_lengths=(8, 16), dilation_rates=(1, 4))
    q, k, v = torch.randn(3, 2, 32, 4, 8).unbind(0)
    expected = dilated_attention_reference(q, k, v, pattern, is_causal=True)
    found = usual_pipeline(q, k, v, pattern).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_memory_counts_what_is_held_at_once():
    def run():
        first = torch.ones(2**20)
        second = first + 1
        del first
        return second.sum()

    assert peak_extra_mib(run) == pytest.approx(8, abs=0.01)


def test_contenders_run_in_turn():
    calls = []
    timings = alternate(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=1
    )
    assert calls == ["a", "b"] * 4
    assert all(t.low_s <= t.median_s <= t.high_s for t in timings.values())


def test_a_wrong_op_is_not_timed(monkeypatch):
    monkeypatch.setattr(benchmark, "ours", lambda q, k, v, pattern: q)
    with pytest.raises(AssertionError, match="not close"):
        benchmark.check_correct()


def test_last_line_is_one_json_document(monkeypatch, capsys, tmp_path):
    output = tmp_path / "results" / "cpu.json"
    arguments = ["--seq-len", "64", "--num-heads", "4", "--head-dim", "8", "--rounds", "1"]
    arguments += ["--segment-lengths", "16", "32", "--dilation-rates", "1", "2"]
    monkeypatch.setattr("sys.argv", ["benchmark", *arguments, "--output", str(output)])
    benchmark.main()
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == json.loads(output.read_text())
    assert document["attended_pairs"] == 4 * (4 * 16 * 17 // 2 + 2 * 16 * 17 // 2)
    assert set(document["ratios"]) == {
        "speed_over_usual",
        "memory_over_usual",
        "time_over_bare_kernels",
        "time_at_double_length",
    }
