import pytest
import torch

from longnet_zoo import DilatedPattern, dilated_attention
from longnet_zoo.ops.kernels import flash2
from longnet_zoo.ops.reference import dilated_attention_reference
from tests.ops.kernels import fake_flash

SEGMENTS, RATES = (4, 7, 14), (1, 2, 4)


@pytest.fixture(autouse=True)
def only_packed_calls(monkeypatch):
    """Gives flash-attn 2 functions that run here; its kernel of blocks must not be used."""

    def load():
        return flash2._Functions(
            forward=None,
            backward=None,
            forward_packed=fake_flash._flash_attn_varlen_forward,
            backward_packed=fake_flash._flash_attn_varlen_backward,
        )

    monkeypatch.setattr(flash2, "_load", load)
    monkeypatch.setattr(flash2, "supports", lambda call: None)
    monkeypatch.delattr(flash2, "PACKAGE")
    fake_flash.PACKED_CALLS.clear()


def lengths_as_mask():
    return {"key_padding_mask": torch.arange(23) >= torch.tensor([[23], [5], [0], [13]])}


def lengths_as_bounds():
    return {"cu_seqlens": torch.tensor([0, 1, 14, 20, 26, 41], dtype=torch.int32)}


@pytest.mark.parametrize("lengths", [lengths_as_mask, lengths_as_bounds])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("num_kv_heads", [1, 3, 6])
@pytest.mark.parametrize("head_offset", ["modulo", "block"])
def test_equals_the_reference(lengths, is_causal, num_kv_heads, head_offset):
    pattern = DilatedPattern(
        segment_lengths=SEGMENTS, dilation_rates=RATES, head_offset=head_offset
    )
    options = {**lengths(), "is_causal": is_causal}
    batch, seq_len = (4, 23) if "key_padding_mask" in options else (1, 41)
    check(pattern, options, (batch, seq_len, 6, 8), (batch, seq_len, num_kv_heads, 8))
    num_calls = 1 + 2 + (4 if head_offset == "modulo" else 3)  # one for each branch and offset
    assert ["forward"] * num_calls + ["backward"] * num_calls == fake_flash.PACKED_CALLS


def test_xpos_whose_segments_nest():
    pattern = DilatedPattern(segment_lengths=(4, 8), dilation_rates=(1, 3))
    options = {**lengths_as_bounds(), "xpos_scale_base": 8.0, "is_causal": True}
    check(pattern, options, (1, 41, 6, 8), (1, 41, 6, 8))


def test_rows_that_no_branch_covers():
    pattern = DilatedPattern(segment_lengths=(6,), dilation_rates=(4,))
    check(pattern, lengths_as_mask(), (4, 23, 6, 8), (4, 23, 2, 8))


def check(pattern, options, shape, kv_shape):
    """Compares outputs, LSEs and every gradient with the reference."""
    q, out_grad, k, v = (torch.randn(x) for x in (shape, shape, kv_shape, kv_shape))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = dilated_attention(*leaves, pattern, backend="flash2", return_lse=True, **options)
    grads = torch.autograd.grad(out, leaves, out_grad)
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = dilated_attention_reference(
        *leaves, pattern, return_lse=True, **options
    )
    expected_grads = torch.autograd.grad(expected, leaves, out_grad.double())
    found = (out.double(), lse.double(), *(grad.double() for grad in grads))
    for x, y in zip(found, (expected, expected_lse, *expected_grads), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-6)
