"""Every backend on a GPU against the float64 oracle: output, LSE and each gradient by itself.

Few head sizes, since some kernels tune themselves for each.
"""

import dataclasses

import pytest
import torch

from longnet_zoo.ops.dilated_attention import dilated_attention
from longnet_zoo.ops.kernels import BACKENDS, KERNELS, capability_of, refusal_of
from longnet_zoo.ops.kernels import Call as KernelCall
from longnet_zoo.ops.pattern import DilatedPattern
from longnet_zoo.ops.positions import apply_rotary, rotary_tables
from tests.ops.draws import TOLERANCES, Call, assert_close, oracle_results, results

pytestmark = pytest.mark.gpu

# Without a GPU these tests are skipped; their code can still be run with the marker taken off.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF_TYPES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF_TYPES)
# Three branches, no length divides another, a tail, heads not divisible by rates.
PLAIN = Call(
    segment_lengths=(24, 50, 131),
    dilation_rates=(1, 3, 4),
    seq_len=211,
    batch=2,
    num_heads=6,
    num_kv_heads=6,
    head_dim=64,
    device=DEVICE,
)
CAUSAL = dataclasses.replace(PLAIN, is_causal=True)
CALLS = {
    "plain": PLAIN,
    "causal": CAUSAL,
    "block_offsets": dataclasses.replace(PLAIN, head_offset="block"),
    "block_offsets_causal": dataclasses.replace(CAUSAL, head_offset="block"),
    "zero_keys": dataclasses.replace(PLAIN, padded_keys="zero", head_offset="block"),
    "zero_keys_padding": dataclasses.replace(PLAIN, padded_keys="zero", padding="right"),
    "right_padding": dataclasses.replace(CAUSAL, padding="right"),
    "left_padding": dataclasses.replace(CAUSAL, padding="left"),
    "random_padding": dataclasses.replace(PLAIN, padding="random"),
    "packed": dataclasses.replace(CAUSAL, batch=1, documents=(1, 55, 55, 100)),
    "grouped": dataclasses.replace(PLAIN, num_kv_heads=2),
    "multi_query": dataclasses.replace(CAUSAL, num_kv_heads=1, batch=1),
    "alibi": dataclasses.replace(CAUSAL, bias="alibi"),
    "table": dataclasses.replace(PLAIN, bias="table", num_kv_heads=3),
    "dense_bias": dataclasses.replace(PLAIN, bias="dense", seq_len=140),
    "dense_bias_shared": dataclasses.replace(CAUSAL, bias="dense_shared", seq_len=140),
    "xpos": dataclasses.replace(CAUSAL, xpos_scale_base=64.0),
    "xpos_nested": dataclasses.replace(
        CAUSAL, xpos_scale_base=64.0, segment_lengths=(24, 48, 96), dilation_rates=(1, 2, 4)
    ),
    "slices": dataclasses.replace(CAUSAL, layout="packed", num_kv_heads=2),
    "no_branch_of_rate_one": dataclasses.replace(PLAIN, dilation_rates=(2, 3, 5)),
    "shorter_than_every_segment": dataclasses.replace(CAUSAL, seq_len=17),
    "one_token": dataclasses.replace(PLAIN, seq_len=1),
    "tail_of_one_token": dataclasses.replace(CAUSAL, seq_len=265, segment_lengths=(24, 66, 132)),
}


def refusal(call: Call, backend: str, dtype: torch.dtype, *, has_lse_grad: bool = False):
    """Why a backend cannot run a call here, or None."""
    if backend == "auto":
        return None
    kernel_call = KernelCall(
        device_type=DEVICE,
        dtype=dtype,
        head_dim=call.head_dim,
        capability=capability_of(torch.device(DEVICE)),
        has_dense_bias=call.bias in ("dense", "dense_shared"),
        has_distance_bias=call.bias in ("alibi", "table"),
        has_hidden_keys=call.padding in ("left", "random"),
        has_unnested_xpos=call.xpos_scale_base is not None and not call.pattern.is_nested,
        has_lse_grad=has_lse_grad,
    )
    return refusal_of(KERNELS[backend], kernel_call)


def check_parity(call: Call, backend: str, dtype: torch.dtype, *, with_lse_grad: bool = False):
    """As on a CPU, but what is summed over hundreds of rows is as exact as its largest entry."""
    reason = refusal(call, backend, dtype)
    if reason is not None:
        pytest.skip(f"{backend} {reason.reason}")
    inputs = call.inputs(dtype)
    got = results(call, inputs, with_lse_grad=with_lse_grad, backend=backend)
    expected = oracle_results(call, inputs, with_lse_grad=with_lse_grad)
    assert got.keys() == expected.keys()
    assert got["out"].dtype == dtype
    tolerance = TOLERANCES[dtype]
    for name, value in expected.items():
        finite = value[value.isfinite()].abs()
        size = max(1.0, float(finite.max()) if len(finite) else 0.0)
        scaled = {"rtol": tolerance["rtol"], "atol": tolerance["atol"] * size}
        assert_close(got[name], value, name, scaled)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_equals_the_oracle(backend, name, dtype):
    check_parity(CALLS[name], backend, dtype)


@pytest.mark.parametrize("head_dim", [16, 40, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_head_sizes_equal_the_oracle(backend, dtype, head_dim):
    check_parity(dataclasses.replace(CAUSAL, head_dim=head_dim), backend, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["causal", "zero_keys", "left_padding", "table"])
def test_gradient_of_the_log_sum_exp_equals_the_oracle(name, dtype):
    check_parity(CALLS[name], "auto", dtype, with_lse_grad=True)


def test_float64_equals_the_oracle():
    check_parity(CALLS["causal"], "auto", torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_some_fused_backend_serves(dtype):
    """Else the tests above could be skipped without anyone's notice."""
    serving = {name for name in KERNELS if refusal(CALLS["causal"], name, dtype) is None}
    assert serving >= {"math", "triton", "sdpa" if dtype in HALF_TYPES else "efficient"}


PATTERN = DilatedPattern.geometric(2048, 32_768)
LARGE_BACKENDS = [name for name in BACKENDS if name != "math"]


def rotated(seq_len: int, num_heads: int = 4, head_dim: int = 64):
    """Queries, keys and values as an xPos layer makes them."""
    tables = rotary_tables(torch.arange(seq_len, device=DEVICE), head_dim)
    shape = (1, seq_len, num_heads, head_dim)
    q, k, v = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    return [x.requires_grad_() for x in (apply_rotary(q, *tables), apply_rotary(k, *tables), v)]


def attend_large(inputs, backend: str):
    return dilated_attention(
        *inputs, PATTERN, is_causal=True, xpos_scale_base=512.0, backend=backend
    )


@pytest.mark.parametrize("backend", LARGE_BACKENDS)
def test_a_million_tokens_are_finite_and_right(backend):
    large = dataclasses.replace(CALLS["xpos_nested"], head_dim=64)
    reason = refusal(large, backend, torch.bfloat16)
    if reason is not None:
        pytest.skip(f"{backend} {reason.reason}")
    inputs = rotated(2**20)
    out = attend_large(inputs, backend)
    grads = torch.autograd.grad(out, inputs, torch.randn_like(out))
    assert all(x.isfinite().all() for x in (out, *grads))
    # Segments end at multiples of the longest, so the last one stands for itself.
    last = [x.detach()[:, -32_768:] for x in inputs]
    alone = attend_large(last, "math")
    torch.testing.assert_close(out[:, -32_768:], alone, **TOLERANCES[torch.bfloat16])


def peak_bytes(seq_len: int, backend: str) -> int:
    """What a forward and backward pass needs beyond its inputs."""
    inputs = rotated(seq_len)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = attend_large(inputs, backend)
    torch.autograd.grad(out, inputs, out)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_memory_grows_linearly(backend):
    peak_bytes(2**16, backend)  # workspaces and tuning
    small, large = (peak_bytes(seq_len, backend) for seq_len in (2**17, 2**19))
    assert large <= 4.1 * small
