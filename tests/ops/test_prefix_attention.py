"""Attention with a prefix against its definition written out densely in float64."""

import pytest
import torch

from longnet_zoo.ops.dilated_attention import dilated_attention
from longnet_zoo.ops.pattern import DilatedPattern
from longnet_zoo.ops.prefix_attention import attend_last_rows, prefix_attention
from longnet_zoo.ops.reference import visible_keys

NESTED = DilatedPattern(segment_lengths=(4, 12), dilation_rates=(1, 3))
CROSSED = DilatedPattern(segment_lengths=(5, 7, 16), dilation_rates=(1, 2, 3))
BLOCK = DilatedPattern(segment_lengths=(6, 18), dilation_rates=(2, 4), head_offset="block")
PATTERNS = pytest.mark.parametrize("pattern", [NESTED, CROSSED, BLOCK], ids=["nested", "x", "b"])
PREFIXES = pytest.mark.parametrize("prefix_len", [1, 13, 17, 24, 30])
SEQ_LEN = 31


def draw(seq_len=SEQ_LEN, dtype=torch.float64, num_heads=4, num_kv_heads=2):
    q = torch.randn(2, seq_len, num_heads, 6, dtype=dtype)
    k, v = torch.randn(2, 2, seq_len, num_kv_heads, 6, dtype=dtype)
    return [x.requires_grad_() for x in (q, k, v)]


def oracle(q, k, v, pattern, prefix_len, key_padding_mask=None):
    """One softmax over the keys that the definition shows each query, branch by branch."""
    batch, seq_len, num_heads, head_dim = q.shape
    sizes = {"batch": batch, "seq_len": seq_len, "num_heads": num_heads}
    counts = visible_keys(pattern, **sizes, key_padding_mask=key_padding_mask).counts
    order = torch.arange(seq_len)
    in_prefix = order < prefix_len
    is_seen = torch.where(in_prefix[:, None], in_prefix, order <= order[:, None])
    counts = counts * is_seen
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(num_heads // x.shape[1], dim=1) for x in (k, v))
    weights = counts * (q @ k.transpose(-1, -2) * head_dim**-0.5).exp()
    total = weights.sum(-1, keepdim=True)
    out = weights @ v / torch.where(total == 0, 1.0, total)
    return out.transpose(1, 2)


@PATTERNS
@PREFIXES
@pytest.mark.parametrize("padding", [None, "right", "holes"])
def test_outputs_and_gradients_equal_the_definition(pattern, prefix_len, padding):
    inputs = draw()
    mask = None
    if padding == "right":
        mask = torch.arange(SEQ_LEN) >= torch.tensor([[SEQ_LEN], [prefix_len + 1]])
    elif padding == "holes":
        mask = torch.rand(2, SEQ_LEN) < 0.3
    out = prefix_attention(*inputs, pattern, prefix_len=prefix_len, key_padding_mask=mask)
    expected = oracle(*inputs, pattern, prefix_len, mask)
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-10)
    cotangent = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, cotangent)
    expected = torch.autograd.grad(expected, inputs, cotangent)
    torch.testing.assert_close(grads, expected, atol=1e-10, rtol=1e-10)


@PATTERNS
@PREFIXES
def test_nothing_sees_what_comes_later(pattern, prefix_len):
    q, k, v = (x.detach() for x in draw(dtype=torch.float32))
    out = prefix_attention(q, k, v, pattern, prefix_len=prefix_len)
    for place in range(prefix_len, SEQ_LEN):
        others = [x.clone() for x in (q, k, v)]
        for x in others:
            x[:, place] += 1.0
        changed = prefix_attention(*others, pattern, prefix_len=prefix_len)
        assert torch.equal(changed[:, :place], out[:, :place])


def test_the_prefix_is_seen_in_both_directions():
    dense = DilatedPattern(segment_lengths=(99,), dilation_rates=(1,))
    q, k, v = (x.detach() for x in draw())
    out = prefix_attention(q, k, v, dense, prefix_len=9)
    v[:, 8] += 1.0
    changed = prefix_attention(q, k, v, dense, prefix_len=9)
    assert ((changed - out).abs().amax((2, 3)) > 1e-4).all()


def test_causal_rows_begin_at_the_last_common_border(monkeypatch):
    lengths = []

    def spy(q, k, v, pattern, **options):
        lengths.append((q.shape[1], options["is_causal"]))
        return dilated_attention(q, k, v, pattern, **options)

    monkeypatch.setattr("longnet_zoo.ops.prefix_attention.dilated_attention", spy)
    for pattern in (NESTED, CROSSED):
        prefix_attention(*draw(), pattern, prefix_len=27)
    assert lengths == [(27, False), (SEQ_LEN - 24, True), (27, False), (SEQ_LEN, True)]


def test_options_reach_the_op():
    q, k, v = draw()
    options = {"scale": 0.2, "xpos_scale_base": 40.0, "backend": "math"}
    options["bias"] = lambda distances: -0.1 * distances.abs().double().expand(4, -1)
    out = prefix_attention(q, k, v, CROSSED, prefix_len=13, **options)
    whole = dilated_attention(q, k, v, CROSSED, is_causal=True, **options)
    torch.testing.assert_close(out[:, 13:], whole[:, 13:])
    alone = dilated_attention(*(x[:, :13] for x in (q, k, v)), CROSSED, **options)
    torch.testing.assert_close(out[:, :13], alone)
    for name in options:
        fewer = {key: x for key, x in options.items() if key != name}
        other = prefix_attention(q, k, v, CROSSED, prefix_len=13, **fewer)
        assert torch.allclose(other, out) == (name == "backend")
    dropped = prefix_attention(q, k, v, CROSSED, prefix_len=13, dropout_p=0.5)
    plain = prefix_attention(q, k, v, CROSSED, prefix_len=13)
    is_changed = (dropped != plain).any(3).any(2)
    assert is_changed[:, :13].any()
    assert is_changed[:, 13:].any()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prefix_len": 0}, ValueError, "got prefix_len=0 and seq_len=31"),
        ({"prefix_len": 31}, ValueError, "got prefix_len=31 and seq_len=31"),
        ({"is_causal": True}, ValueError, "got is_causal=True"),
        ({"bias": torch.zeros(1, 1, 31, 31)}, NotImplementedError, "got a tensor as bias"),
        ({"cu_seqlens": torch.tensor([0, 31])}, NotImplementedError, "got cu_seqlens"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_has_no_meaning_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        prefix_attention(*draw(), NESTED, **({"prefix_len": 9} | options))


def test_zero_keys_are_refused():
    pattern = DilatedPattern(segment_lengths=(4,), dilation_rates=(1,), padded_keys="zero")
    with pytest.raises(ValueError, match="with padded_keys='zero' a prefix would not"):
        prefix_attention(*draw(), pattern, prefix_len=9)


# --- Rows of keys that are kept ---


@PATTERNS
@pytest.mark.parametrize("num_rows", [1, 6, SEQ_LEN])
def test_last_rows_equal_those_of_causal_attention(pattern, num_rows):
    for seq_len in range(max(num_rows, 3), SEQ_LEN + 1, 4):
        q, k, v = draw(seq_len)
        whole = dilated_attention(q, k, v, pattern, is_causal=True)
        rows = attend_last_rows(q[:, seq_len - num_rows :], k, v, pattern)
        torch.testing.assert_close(rows, whole[:, seq_len - num_rows :], atol=1e-10, rtol=1e-10)
    whole = dilated_attention(q, k, v, pattern, is_causal=True, scale=0.3)
    rows = attend_last_rows(q[:, -2:], k, v, pattern, scale=0.3)
    torch.testing.assert_close(rows, whole[:, -2:], atol=1e-10, rtol=1e-10)


def test_last_rows_keep_the_dtype():
    q, k, v = (x.detach().bfloat16() for x in draw())
    rows = attend_last_rows(q[:, -3:], k, v, NESTED)
    assert rows.dtype == torch.bfloat16
    exact = attend_last_rows(*(x.double() for x in (q[:, -3:], k, v)), NESTED)
    torch.testing.assert_close(rows.double(), exact, atol=2e-2, rtol=2e-2)
