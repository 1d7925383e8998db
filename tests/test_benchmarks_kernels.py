import json
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn import functional

from benchmarks import contenders, kernels, peers
from benchmarks.contenders import FLOPS, PASSES, Shape, contenders_of
from benchmarks.record import Crash, Record
from longnet_zoo.ops import BACKENDS, DilatedPattern
from longnet_zoo.ops.kernels import preference

PATTERN = DilatedPattern(segment_lengths=(16, 32), dilation_rates=(1, 2))
SHAPE = Shape(
    seq_len=64,
    num_heads=4,
    head_dim=8,
    dtype="float32",
    device=torch.device("cpu"),
    pattern=PATTERN,
)
ARGUMENTS = "--seq-lens 64 --shapes 4x8 --segment-lengths 16 32 --dilation-rates 1 2 --rounds 1"


def run(*extra):
    options = kernels.read_options([*ARGUMENTS.split(), "--device", "cpu", *map(str, extra)])
    return kernels.main(options)


def contender(name):
    (found,) = [x for x in contenders_of(SHAPE, ()) if x.name == name]
    return found


def test_dense_attention_gets_the_length_of_equal_pairs():
    assert SHAPE.pairs == 4 * (4 * 16 * 17 // 2 + 2 * 16 * 17 // 2)
    # 816 pairs a head are those of about 40 dense tokens: 40 * 41 / 2 = 820.
    assert SHAPE.dense_len == 40
    long = replace(SHAPE, seq_len=2**16, pattern=DilatedPattern.geometric(2048, 32768))
    assert long.dense_len % 128 == 0
    pairs = long.num_heads * long.dense_len * (long.dense_len + 1) // 2
    assert pairs == pytest.approx(long.pairs, rel=0.01)


def test_each_backend_has_a_cell_with_figures_or_a_reason(tmp_path, capsys):
    # All kernels run, Triton's in its interpreter, so the size is a quarter of the others'.
    small = replace(SHAPE, seq_len=32, num_heads=2)
    output = tmp_path / "kernels.json"
    assert run("--output", output, "--seq-lens", 32, "--shapes", "2x8") == 0
    document = json.loads(output.read_text())
    assert document == json.loads(capsys.readouterr().out.splitlines()[-1])
    cells = {cell["contender"]: cell for cell in document["cells"]}
    assert {f"dilated, {backend}" for backend in BACKENDS[1:]} < set(cells)
    assert cells["dilated, cudnn"]["reason"] == "backend 'cudnn' needs a CUDA device, got 'cpu'"
    # Its release on the package index has no LongNet.
    assert cells["torchscale"]["reason"].startswith("not installed (No module named 'torchscale")
    ours, dense = cells["dilated, sdpa"], cells["dense, flash"]
    usual = cells["usual pipeline"]
    for passed in PASSES:
        figures, ratios = ours[passed], ours[passed]["ratios"]
        assert figures["low_ms"] <= figures["median_ms"] <= figures["high_ms"]
        flops = FLOPS[passed] * 8 * small.pairs
        assert figures["tflops_per_s"] == pytest.approx(flops / figures["median_ms"] / 1e9, 1e-3)
        assert ratios["flops_over_dense"] == pytest.approx(
            figures["tflops_per_s"] / dense[passed]["tflops_per_s"], 1e-3
        )
        assert ratios["speed_over_usual"] == pytest.approx(
            usual[passed]["median_ms"] / figures["median_ms"], 1e-3
        )
        assert ratios["memory_over_usual"] == pytest.approx(
            figures["peak_extra_mib"] / usual[passed]["peak_extra_mib"], 1e-3
        )
    # 408 pairs a head are those of about 28 dense tokens, in whole tiles of 8.
    assert dense["dense_len"] == 32


def test_finished_cells_are_not_run_again(tmp_path, monkeypatch):
    output = tmp_path / "kernels.json"
    run("--output", output, "--backends", "sdpa", "math")
    before = json.loads(output.read_text())
    kept = [cell for cell in before["cells"] if cell["contender"] != "dilated, math"]
    output.write_text(json.dumps({**before, "cells": kept}))
    prepared = []
    prepare = kernels.prepare
    monkeypatch.setattr(
        kernels, "prepare", lambda x, limit_s: prepared.append(x.name) or prepare(x, limit_s)
    )
    run("--output", output, "--backends", "sdpa", "math", "--resume")
    # Those that others are compared with run once more, so that ratios are of one process.
    assert set(prepared) == {"dilated, math", "dense, flash", "usual pipeline", "bare kernel calls"}
    cells = json.loads(output.read_text())["cells"]
    names = [cell["contender"] for cell in cells]
    assert sorted(names) == sorted(cell["contender"] for cell in before["cells"])
    assert [cell for cell in cells if cell["contender"] != "dilated, math"] == kept
    (math,) = [cell for cell in cells if cell["contender"] == "dilated, math"]
    assert math["forward"]["ratios"].keys() == kept[-1]["forward"]["ratios"].keys()


@pytest.mark.parametrize("name", ["dilated, sdpa", "dense, flash", "usual pipeline"])
def test_a_wrong_contender_is_not_timed(name, monkeypatch, tmp_path):
    def wrong(q, k, v, **_):
        return q

    for function in ("dilated_attention", "usual_pipeline"):
        monkeypatch.setattr(contenders, function, lambda q, *_, **__: q)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", wrong)
    output = tmp_path / "kernels.json"
    assert run("--output", output, "--backends", "sdpa") == 1
    cells = {cell["contender"]: cell for cell in json.loads(output.read_text())["cells"]}
    assert cells[name]["reason"].startswith("wrong: ")
    assert cells[name].keys().isdisjoint(PASSES)


def test_a_wrong_gradient_is_found(monkeypatch):
    right = contenders.dilated_attention
    assert contender("dilated, sdpa").check() is None

    def without_dv(q, k, v, *args, **options):
        return right(q, k, v.detach() + 0 * v, *args, **options)

    monkeypatch.setattr(contenders, "dilated_attention", without_dv)
    assert contender("dilated, sdpa").check().startswith("wrong: dv is off from the oracle by")


def test_slow_calls_are_not_timed():
    with pytest.raises(TimeoutError, match=r"forward takes 0 s a call, over the limit 0\.0"):
        kernels.prepare(contender("dilated, sdpa"), limit_s=0.0)


def test_a_broken_device_ends_the_run_with_the_reason_on_disk(monkeypatch):
    def prepare(contender, limit_s):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(kernels, "prepare", prepare)
    record = Record("kernels", {}, device=SHAPE.device, output=None, resume=False)
    options = kernels.read_options([])
    with pytest.raises(Crash, match="dilated, sdpa broke the device: CUDA error: an illegal"):
        kernels.measure(SHAPE, options, record)
    (cell,) = record.cells
    assert cell["reason"] == "CUDA error: an illegal memory access was encountered"


def test_memory_that_ends_while_timing_costs_the_largest_only(monkeypatch):
    alternate, calls = kernels.alternate, []

    def exhaust_once(runs, **options):
        calls.append(list(runs))
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return alternate(runs, **options)

    monkeypatch.setattr(kernels, "alternate", exhaust_once)
    record = Record("kernels", {}, device=SHAPE.device, output=None, resume=False)
    options = kernels.read_options(["--rounds", "1", "--backends", "sdpa", "math"])
    kernels.measure(SHAPE, options, record)
    reasons = [x["contender"] for x in record.cells if "beside the others" in x.get("reason", "")]
    # `math` holds the logits of a chunk.
    assert reasons == ["dilated, math"]
    assert {name.rpartition(", ")[0] for name in calls[0]} - {"dilated, math"} == {
        x["contender"] for x in record.cells if "forward" in x
    }


def test_bare_calls_say_which_lengths_they_need():
    odd = replace(SHAPE, seq_len=65)
    (bare,) = [x for x in contenders_of(odd, ()) if x.kind == "bare"]
    with pytest.raises(NotImplementedError, match="segments that divide seq_len=65"):
        bare.make()


def test_wrong_shapes_are_refused(capsys):
    for text in ("12", "12x", "0x8", "1x2x3"):
        with pytest.raises(SystemExit):
            kernels.read_options(["--shapes", text])
        assert f"must be HEADSxHEAD_DIM such as 12x64, got '{text}'" in capsys.readouterr().err


def test_preference_is_written_from_results(tmp_path, monkeypatch):
    output, table = tmp_path / "kernels.json", tmp_path / "preference.json"
    run("--output", output, "--backends", "sdpa", "math")
    document = json.loads(output.read_text())
    rows = kernels.preference_rows(document)
    assert [(row["backend"], row["pass"]) for row in rows] == [
        ("sdpa", "forward"),
        ("sdpa", "backward"),
        ("math", "forward"),
        ("math", "backward"),
    ]
    cells = {cell.get("backend"): cell for cell in document["cells"]}
    forward_ms, both_ms = (cells["sdpa"][passed]["median_ms"] for passed in PASSES)
    assert rows[0]["ms"] == forward_ms
    assert rows[1]["ms"] == pytest.approx(both_ms - forward_ms)
    table.write_text("[]")
    write = preference.write_preference
    monkeypatch.setattr(kernels, "write_preference", lambda rows: write(rows, table))
    # A backward pass can be lost in the noise of so small a run.
    monkeypatch.setattr(
        kernels, "preference_rows", lambda x: [{**row, "ms": abs(row["ms"])} for row in rows]
    )
    assert run("--write-preference", output) == 0
    found = {(row["device"], row["pass"]): row["order"] for row in json.loads(table.read_text())}
    assert set(found) == {("cpu", "forward"), ("cpu", "backward")}
    assert set(found["cpu", "forward"]) == {"sdpa", "math"}


class TorchscaleAttention(nn.Module):
    """Takes and gives what microsoft/torchscale's layer does."""

    def __init__(self, args, embed_dim, num_heads, *, self_attention):
        super().__init__()
        assert args.flash_attention
        assert self_attention
        self.segment_length, self.num_heads = args.segment_length, num_heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(embed_dim, embed_dim))

    def forward(self, query, key, value, *, is_causal):
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        return self.out_proj(out.transpose(1, 2).flatten(2)), None


class PytorchAttention(nn.Module):
    """Takes and gives what dilated-attention-pytorch's attention does."""

    def __init__(self, segment_lengths, dilation_rates):
        super().__init__()

    def forward(self, query, key, value, is_causal=False):
        rows = (x.transpose(1, 2) for x in (query, key, value))
        return functional.scaled_dot_product_attention(*rows, is_causal=is_causal).transpose(1, 2)


class OneHead(nn.Module):
    """Takes and gives what dilated-self-attention's attention of one head does."""

    def __init__(self, embedding_dim, out_dim, max_n):
        super().__init__()
        self.qkv_proj = nn.Linear(embedding_dim, 3 * out_dim)

    def forward(self, x):
        q, k, v = self.qkv_proj(x).chunk(3, dim=-1)
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


class OneDilatedHead(nn.Module):
    def __init__(self, ws, rs, head_idx, attn_module):
        super().__init__()
        self.attn = attn_module

    def forward(self, x):
        return self.attn(x)


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        (
            "torchscale",
            {"torchscale.component.dilated_attention": {"DilatedAttention": TorchscaleAttention}},
        ),
        (
            "dilated-attention-pytorch",
            {"dilated_attention_pytorch.dilated_attention": {"DilatedAttention": PytorchAttention}},
        ),
        (
            "dilated-self-attention",
            {
                "dilated_self_attention.dilated_self_attention": {
                    "DilatedSelfAttention": OneDilatedHead
                },
                "dilated_self_attention.self_attention": {"SelfAttention": OneHead},
            },
        ),
    ],
)
def test_packages_attend_without_their_projections(name, modules, monkeypatch):
    for path, names in modules.items():
        parts = path.split(".")
        for depth in range(1, len(parts) + 1):
            module = ModuleType(".".join(parts[:depth]))
            monkeypatch.setitem(sys.modules, module.__name__, module)
        vars(module).update(names)
    q, k, v = torch.randn(3, 2, 20, 4, 8).unbind(0)
    found = peers.make_peer(name, PATTERN, q)(q, k, v)
    rows = (x.transpose(1, 2) for x in (q, k, v))
    expected = functional.scaled_dot_product_attention(*rows, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    (cell,) = [x for x in contenders_of(SHAPE, ()) if x.name == name]
    assert cell.check() is None
    assert cell.facts["largest_difference"] > 0.1
