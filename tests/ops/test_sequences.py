import pytest
import torch

from longnet_zoo.ops import sequences
from longnet_zoo.ops.dilated_attention import dilated_attention
from longnet_zoo.ops.pattern import DilatedPattern
from longnet_zoo.ops.sequences import split_sequences


def spans(groups):
    return [(group.is_packed, group.first, group.count, group.length) for group in groups]


def test_a_full_batch_is_one_group():
    groups, is_hidden = split_sequences(torch.empty(3, 7), None, None, is_single=False)
    assert spans(groups) == [(False, 0, 3, 7)]
    assert is_hidden is None


def test_right_padding_becomes_lengths():
    x = torch.arange(21).view(3, 7)
    mask = torch.arange(7) >= torch.tensor([[5], [5], [0]])
    groups, is_hidden = split_sequences(x, mask, None, is_single=False)
    assert spans(groups) == [(False, 0, 2, 5)]
    assert is_hidden is None
    assert torch.equal(groups[0].select(x), x[:2, :5])


def test_other_padding_stays_a_mask():
    mask = torch.tensor([[True, False, False]])
    groups, is_hidden = split_sequences(torch.empty(1, 3), mask, None, is_single=False)
    assert spans(groups) == [(False, 0, 1, 3)]
    assert is_hidden is mask


def test_packed_neighbours_of_equal_length_share_a_view():
    x = torch.arange(14).view(1, 14)
    bounds = torch.tensor([0, 1, 5, 9, 13, 14], dtype=torch.int32)
    groups, _ = split_sequences(x, None, bounds, is_single=False)
    assert spans(groups) == [(True, 0, 1, 1), (True, 1, 3, 4), (True, 13, 1, 1)]
    assert torch.equal(groups[1].select(x), torch.arange(1, 13).view(3, 4))
    single, _ = split_sequences(x, None, bounds, is_single=True)
    assert spans(single)[1:4] == [(True, 1, 1, 4), (True, 5, 1, 4), (True, 9, 1, 4)]


@pytest.mark.parametrize("bounds", [[1, 6], [0, 5], [0, 3, 3, 6], [0, 4, 2, 6], [0, 7]])
def test_bounds_must_rise_to_the_end(bounds):
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    message = rf"rise strictly from 0 to seq_len=6, got \[{', '.join(map(str, bounds))}\]"
    with pytest.raises(ValueError, match=message):
        split_sequences(torch.empty(1, 6), None, cu_seqlens, is_single=False)


def test_right_padding_stays_a_mask_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(sequences, "can_read", lambda x: False)
    mask = torch.arange(7) >= torch.tensor([[5], [5], [0]])
    groups, is_hidden = split_sequences(torch.empty(3, 7), mask, None, is_single=False)
    assert spans(groups) == [(False, 0, 3, 7)]
    assert is_hidden is mask


def test_packed_sequences_cannot_be_captured(monkeypatch):
    monkeypatch.setattr(sequences, "can_read", lambda x: False)
    bounds = torch.tensor([0, 2, 6], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match=r"CUDA graph, got 2 packed sequences.*without"):
        split_sequences(torch.empty(1, 6), None, bounds, is_single=False)


@pytest.mark.parametrize("is_causal", [False, True])
def test_right_padding_as_a_mask_gives_the_same(monkeypatch, is_causal):
    """Without zero keys a segment that ends early and one whose end is hidden are the same."""
    pattern = DilatedPattern(segment_lengths=(5, 11, 23), dilation_rates=(1, 3, 2))
    q, k, v = torch.randn(3, 4, 31, 3, 8, dtype=torch.float64).unbind()
    mask = torch.arange(31) >= torch.tensor([[31], [17], [3], [0]])
    options = {"is_causal": is_causal, "key_padding_mask": mask, "return_lse": True}
    expected = dilated_attention(q, k, v, pattern, **options)
    monkeypatch.setattr(sequences, "can_read", lambda x: False)
    found = dilated_attention(q, k, v, pattern, **options)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
