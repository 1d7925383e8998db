"""Cutting sequences where no attention crosses."""

import pytest
import torch

from longnet_zoo.layers import MemorySaving, Route, TransformerStack
from longnet_zoo.layers.spans import independent_spans, split_route
from longnet_zoo.ops.pattern import DilatedPattern


@pytest.mark.parametrize(
    ("bounds", "min_length", "expected"),
    [
        ([0, 30], 1, [[0, 10], [10, 20], [20, 30]]),
        ([0, 34], 11, [[0, 10, 20], [20, 30, 34]]),
        ([0, 34], 99, [[0, 10, 20, 30, 34]]),
        ([0, 3], 1, [[0, 3]]),
        ([0, 12, 15, 26], 5, [[0, 10], [10, 12, 15], [15, 25], [25, 26]]),
    ],
)
def test_spans_by_hand(bounds, min_length, expected):
    assert independent_spans(bounds, segment_length=10, min_length=min_length) == expected


def test_no_attention_crosses_a_span():
    pattern = DilatedPattern(segment_lengths=(5, 10), dilation_rates=(1, 3))
    reached = pattern.mask_counts(34, 4).any(dim=0)
    for first, *_, last in independent_spans([0, 34], segment_length=10, min_length=11):
        reached[first:last, first:last] = False
    assert not reached.any()


@pytest.mark.parametrize("is_split", [True, False])
def test_routes_of_parts_are_those_of_their_tokens(is_split):
    modalities = torch.randint(3, (2, 17))
    if is_split:
        modalities = torch.tensor([0] * 6 + [1] * 1 + [2] * 10).expand(2, -1)
        route = Route.split(6, 1, 10)
    else:
        route = Route.per_token(modalities, num_modalities=3)
    sizes = [4, 1, 9, 3]
    parts = split_route(route, sizes)
    for part, own in zip(parts, modalities.split(sizes, dim=1), strict=True):
        counts = own.flatten().bincount(minlength=3) // (2 if is_split else 1)
        assert part.lengths == tuple(counts.tolist())
        if not is_split:
            assert torch.equal(own.flatten()[part.order], own.flatten().sort().values)
    assert split_route(None, sizes) == [None] * 4


@pytest.mark.parametrize("is_split", [True, False])
def test_tokens_beyond_the_sequences_go_with_the_last_modality(is_split):
    modalities = torch.tensor([[0, 0, 1, 2], [0, 0, 1, 2]])
    route = Route.split(2, 1, 1) if is_split else Route.per_token(modalities, num_modalities=3)
    parts = route.parts([3, 3, 3])
    number = 1 if is_split else 2  # tokens of a sequence, or of the batch
    assert [part.lengths for part in parts] == [
        (2 * number, number, 0),
        (0, 0, 3 * number),
        (0, 0, 3 * number),
    ]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"key_padding_mask": torch.zeros(1, 40, dtype=torch.bool)}, r"got \(1, 40\)"),
        ({"cu_seqlens": torch.tensor([0, 20, 10, 34], dtype=torch.int32)}, r"\[0, 20, 10, 34\]"),
        ({"cu_seqlens": torch.tensor([0, 20, 33], dtype=torch.int32)}, r"\[0, 20, 33\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_as_ever(inputs, message):
    pattern = DilatedPattern(segment_lengths=(5, 10), dilation_rates=(1, 3))
    stack = TransformerStack(embed_dim=24, num_layers=1, num_heads=4, ffn_dim=31, pattern=pattern)
    stack.set_memory_saving(MemorySaving(chunk_size=3))
    with pytest.raises(ValueError, match=message):
        stack(torch.randn(1, 34, 24), **inputs)


def test_rotary_tables_of_another_length_are_refused_as_ever():
    pattern = DilatedPattern(segment_lengths=(5, 10), dilation_rates=(1, 3))
    stack = TransformerStack(embed_dim=24, num_layers=1, num_heads=4, ffn_dim=31, pattern=pattern)
    block, x = stack.blocks[0], torch.randn(1, 34, 24)
    tables = stack.rotary(torch.arange(40))
    for saving in (None, MemorySaving(chunk_size=3)):
        block.memory_saving = saving
        with pytest.raises(ValueError, match=r"x \(1, 34, 4, 6\), cos \(40, 3\)"):
            block(x, rotary=tables)
