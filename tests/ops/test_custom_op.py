"""Very long sequences are attended in spans that no branch crosses."""

import dataclasses

import pytest
import torch

from longnet_zoo.ops import custom_op
from longnet_zoo.ops.dilated_attention import dilated_attention
from tests.ops.draws import Call, assert_parity

CALL = Call(segment_lengths=(4, 12), dilation_rates=(1, 3), seq_len=53, batch=2, head_dim=6)
CALLS = {
    "plain": CALL,
    "causal": dataclasses.replace(CALL, is_causal=True),
    "causal_with_zero_keys": dataclasses.replace(CALL, is_causal=True, padded_keys="zero"),
    "xpos": dataclasses.replace(CALL, xpos_scale_base=64.0),
    "table": dataclasses.replace(CALL, bias="table"),
    "packed_layout": dataclasses.replace(CALL, layout="packed"),
}
WHOLE = {
    "zero_keys": dataclasses.replace(CALL, padded_keys="zero"),
    "segments_that_do_not_nest": dataclasses.replace(CALL, segment_lengths=(5, 12)),
    "padding": dataclasses.replace(CALL, padding="right"),
    "documents": dataclasses.replace(CALL, batch=1, documents=(20, 33)),
    "dense_bias": dataclasses.replace(CALL, bias="dense"),
}


@pytest.fixture
def spans_of_24(monkeypatch):
    """Lets two longest segments fit; returns the lengths of all that was attended at once."""
    monkeypatch.setattr(custom_op, "_MAX_ELEMENTS", 24 * 2 * 3 * 6)
    lengths = []
    problem = custom_op.Options.problem

    def recorded(self, q, k, **options):
        lengths.append(q.shape[1])
        return problem(self, q, k, **options)

    monkeypatch.setattr(custom_op.Options, "problem", recorded)
    return lengths


@pytest.mark.parametrize("name", CALLS)
def test_spans_give_the_same(name, spans_of_24):
    assert_parity(CALLS[name], with_lse_grad=True)
    assert spans_of_24 == [24, 24, 5] * 2


@pytest.mark.parametrize("name", WHOLE)
def test_what_would_change_is_not_cut(name, monkeypatch, spans_of_24):
    monkeypatch.setattr(custom_op, "_MAX_ELEMENTS", 1)
    assert_parity(WHOLE[name])
    assert spans_of_24 == [53, 53]


def test_spans_draw_their_own_dropout(spans_of_24):
    q = torch.zeros(2, 48, 3, 6)
    v = torch.eye(6).repeat(8, 1)[None, :, None].expand(2, -1, 3, -1)
    out = dilated_attention(q, q, v, CALL.pattern, dropout_p=0.5)
    assert not torch.equal(out[:, :24], out[:, 24:])


@pytest.mark.usefixtures("spans_of_24")
def test_dropout_in_spans_has_the_gradient_of_what_it_computed():
    inputs = [torch.randn(2, 29, 3, 6, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    factors = torch.randn(2, 29, 3, 6, dtype=torch.float64)

    def loss(*inputs):
        torch.manual_seed(3)
        return (dilated_attention(*inputs, CALL.pattern, dropout_p=0.3) * factors).sum()

    torch.autograd.gradcheck(loss, inputs, atol=1e-6, fast_mode=True)
