"""Outputs that torchscale's DilatedAttention (commit 4d1e0e8) gave are reproduced."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from longnet_zoo.ops.dilated_attention import dilated_attention
from longnet_zoo.ops.pattern import DilatedPattern

FIXTURE = Path(__file__).parents[1] / "fixtures" / "torchscale_dilated_attention.safetensors"

with safe_open(FIXTURE, "pt") as _file:
    CASES = json.loads(_file.metadata()["cases"])


def load(number: str) -> tuple[list[torch.Tensor], torch.Tensor, dict]:
    """q, k, v; the published output; the arguments of the pattern."""
    case = CASES[number]
    assert case["padded_keys"] == "attend_as_zero"
    branches = {key: tuple(case[key]) for key in ("segment_lengths", "dilation_rates")}
    with safe_open(FIXTURE, "pt") as file:
        *qkv, out = (file.get_tensor(f"{number}.{name}") for name in ("q", "k", "v", "out"))
    return qkv, out, branches


def test_the_fixture_holds_ten_cases():
    assert sorted(CASES, key=int) == [str(number) for number in range(10)]
    assert {case["head_offset"] for case in CASES.values()} == {"block"}
    assert {case["is_causal"] for case in CASES.values()} == {False, True}


@pytest.mark.parametrize("number", CASES)
@pytest.mark.parametrize("backend", ["auto", "sdpa", "math"])
def test_published_outputs_are_reproduced(backend, number):
    (q, k, v), expected, branches = load(number)
    pattern = DilatedPattern(**branches, head_offset="block", padded_keys="zero")
    is_causal = CASES[number]["is_causal"]
    out = dilated_attention(q, k, v, pattern, is_causal=is_causal, backend=backend)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "switches",
    [
        {"head_offset": "modulo", "padded_keys": "zero"},
        {"head_offset": "block", "padded_keys": "ignore"},
    ],
)
def test_each_switch_matters_to_the_published_outputs(switches):
    """A fixture that any switch reproduces would prove nothing."""
    furthest = 0.0
    for number, case in CASES.items():
        (q, k, v), expected, branches = load(number)
        pattern = DilatedPattern(**branches, **switches)
        out = dilated_attention(q, k, v, pattern, is_causal=case["is_causal"])
        furthest = max(furthest, (out - expected).abs().max().item())
    assert furthest > 0.5
