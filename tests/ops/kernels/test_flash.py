import sys

import pytest
import torch

from longnet_zoo import DilatedPattern, dilated_attention
from longnet_zoo.ops.kernels import Call, flash2, flash3, flash4, math, packages
from longnet_zoo.ops.kernels.call import BlockOptions
from longnet_zoo.ops.kernels.flash_parts import laid_out
from longnet_zoo.ops.reference import dilated_attention_reference
from tests.ops.kernels import fake_flash

KERNELS = {"flash2": flash2, "flash3": flash3, "flash4": flash4}
every_kernel = pytest.mark.parametrize("name", KERNELS)


@pytest.fixture(autouse=True)
def installed(monkeypatch, tmp_path):
    """Puts the fake packages in the path, as if the real ones were installed."""
    fake_flash.install(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith("flash_attn")]:
        monkeypatch.delitem(sys.modules, name)
    packages._is_found.cache_clear()
    packages._failure.cache_clear()
    fake_flash.CALLS.clear()
    fake_flash.PACKED_CALLS.clear()
    yield
    for name in [name for name in sys.modules if name.startswith("flash_attn")]:
        del sys.modules[name]
    packages._is_found.cache_clear()
    packages._failure.cache_clear()


def rows(num_kv_heads=6):
    """Strided rows, as a block of rate 2 has them; heads of keys may be one head, repeated."""
    q, out_grad = (torch.randn(2, 26, 6, 8)[:, 1::2] for _ in range(2))
    k, v = (torch.randn(2, 26, num_kv_heads, 8)[:, 1::2] for _ in range(2))
    return q, k.expand(-1, -1, 6, -1), v.expand(-1, -1, 6, -1), out_grad


@every_kernel
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("num_kv_heads", [1, 6])
def test_a_block_of_a_larger_softmax(name, is_causal, num_kv_heads):
    q, k, v, out_grad = rows(num_kv_heads)
    options = BlockOptions(scale=0.3, is_causal=is_causal, is_kv_shared=num_kv_heads == 1)
    kernel = KERNELS[name]
    assert kernel.PACKAGE.is_installed()
    assert kernel.PACKAGE.failure() is None
    out, lse = kernel.forward(q, k, v, options)
    torch.testing.assert_close((out, lse), math.forward(q, k, v, options))
    joint = (out / 2, lse + 0.7)
    expected = math.backward(out_grad, q, k, v, *joint, options)
    q_grad, k_grad, v_grad = kernel.backward(out_grad, q, k, v, *joint, options)
    if num_kv_heads == 1:
        expected = (expected[0], *(grad.sum(2, keepdim=True) for grad in expected[1:]))
    torch.testing.assert_close((q_grad, k_grad, v_grad), expected)
    generation = int(name[-1])
    shape = (2, 13, num_kv_heads, 8)
    assert [(generation, shape, None), (generation, shape, True)] == fake_flash.CALLS


@every_kernel
def test_deterministic_kernels_are_asked_for_where_pytorch_is_to_be(name):
    torch.use_deterministic_algorithms(False)  # `nan_filled_memory` had turned it on
    q, k, v, out_grad = rows()
    options = BlockOptions(scale=0.3, is_causal=False)
    KERNELS[name].backward(out_grad, q, k, v, q, q[..., 0], options)
    assert fake_flash.CALLS[-1][-1] is False


@every_kernel
@pytest.mark.parametrize(
    ("num_kv_heads", "has_expanded_keys"), [(1, False), (2, False), (6, False), (6, True)]
)
def test_whole_op_equals_the_reference(name, num_kv_heads, has_expanded_keys, monkeypatch):
    monkeypatch.setattr(KERNELS[name], "supports", lambda call: None)
    pattern = DilatedPattern(segment_lengths=(8, 14, 29), dilation_rates=(1, 3, 4))
    q, out_grad = (torch.randn(2, 37, 6, 8) for _ in range(2))
    k, v = (torch.randn(2, 37, num_kv_heads, 8) for _ in range(2))
    if has_expanded_keys:  # every query head gets its own gradient, whatever the strides
        k, v = (x[:, :, :1].expand(-1, -1, 6, -1) for x in (k, v))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = dilated_attention(*leaves, pattern, is_causal=True, backend=name)
    grads = torch.autograd.grad(out, leaves, out_grad)
    assert {call[0] for call in fake_flash.CALLS} == {int(name[-1])}
    leaves = [x.double().detach().requires_grad_() for x in (q, k, v)]
    expected = dilated_attention_reference(*leaves, pattern, is_causal=True)
    expected_grads = torch.autograd.grad(expected, leaves, out_grad.double())
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-6)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad.double(), expected_grad, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("switch", "options"), [("zero", {}), ("ignore", {"xpos_scale_base": 8.0})]
)
def test_what_packed_calls_do_not_serve_is_done_block_by_block(switch, options, monkeypatch):
    monkeypatch.setattr(flash2, "supports", lambda call: None)
    pattern = DilatedPattern(
        segment_lengths=(8, 14), dilation_rates=(1, 3), padded_keys=switch, head_offset="block"
    )
    options = {**options, "cu_seqlens": torch.tensor([0, 9, 37], dtype=torch.int32)}
    q, k, v = torch.randn(3, 1, 37, 6, 8).unbind(0)
    out = dilated_attention(q, k, v, pattern, backend="flash2", **options)
    assert fake_flash.CALLS
    assert not fake_flash.PACKED_CALLS
    expected = dilated_attention_reference(*(x.double() for x in (q, k, v)), pattern, **options)
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-6)


def test_tensors_that_cannot_be_read_in_pieces_of_16_bytes_are_copied():
    aligned = torch.randn(2, 13, 3, 8)
    shifted = torch.randn(2, 13, 3, 10)[..., 1:9]
    found = laid_out(aligned, shifted)
    assert found[0] is aligned
    assert found[1].is_contiguous()
    assert torch.equal(found[1], shifted)


HALF = {"device_type": "cuda", "dtype": torch.bfloat16, "head_dim": 64, "capability": (9, 0)}


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("flash2", {"capability": (7, 5)}, "compute capability 8.x to 12.x, got 7.5"),
        ("flash3", {"capability": (10, 0)}, "compute capability 9.x, got 10.0"),
        ("flash4", {"capability": (8, 0)}, "compute capability 9.x to 10.x, got 8.0"),
        ("flash4", {"capability": None}, "compute capability 9.x to 10.x, got none"),
        ("flash2", {"head_dim": 264}, "divisible by 8 and at most 256, got 264"),
        ("flash3", {"head_dim": 20}, "divisible by 8 and at most 256, got 20"),
        ("flash4", {"head_dim": 136, "capability": (10, 0)}, "at most 128, got 136"),
        ("flash2", {"dtype": torch.float32}, "does not support torch.float32"),
        ("flash3", {"device_type": "cpu"}, "needs a CUDA device, got 'cpu'"),
        ("flash4", {"has_dropout": True}, "does not support attention dropout"),
    ],
)
def test_what_flash_attention_does_not_support(name, changes, reason):
    assert KERNELS[name].supports(Call(**HALF)) is None
    assert reason in KERNELS[name].supports(Call(**{**HALF, **changes}))
