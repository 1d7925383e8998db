"""Cases of test_dilated.py with Triton's kernels in their interpreter, which takes its time.

They attend to parts as whole sequences of their own, so the number of ranks makes no difference.
"""

import pytest
import torch

from longnet_zoo.ops.pattern import DilatedPattern
from tests.parallel.dilated_cases import attend, case, of_powers


def parts_of_whole_segments_are_needed():
    q, k, v = torch.randn(3, 1, 6, 2, 16)
    pattern = DilatedPattern(segment_lengths=(4,), dilation_rates=(1,))
    with pytest.raises(NotImplementedError, match="parts of a multiple of the shorter segments"):
        attend(q, k, v, pattern, backend="triton")


POWERS = of_powers()
CASES = {
    "parts_of_whole_segments_are_needed": parts_of_whole_segments_are_needed,
    "plain": case(POWERS, backend="triton"),
    "causal": case(of_powers(is_causal=True), backend="triton"),
    "alibi": case(of_powers(bias="alibi", is_causal=True), backend="triton"),
    "xpos": case(of_powers(xpos_scale_base=16.0, is_causal=True), backend="triton"),
    "padded": case(of_powers(batch=2, padding="random"), backend="triton"),
    "grouped_queries": case(
        of_powers(num_heads=4, num_kv_heads=2, is_causal=True), backend="triton"
    ),
    "lse_gradient": case(POWERS, backend="triton", with_lse_grad=True),
    "no_segment_is_cut": case(
        of_powers(segment_lengths=(4, 8), dilation_rates=(1, 2)), backend="triton"
    ),
}
