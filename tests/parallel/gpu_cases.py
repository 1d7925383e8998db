"""Cases of tests/gpu/test_parallel.py: ranks that share one GPU, over gloo, which copies."""

from dataclasses import replace
from functools import partial

import torch

from tests.ops.draws import HALF
from tests.parallel.dilated_cases import attend, of, of_powers
from tests.parallel.parity import assert_parts_equal_whole

SIZES = {"head_dim": 16, "num_heads": 4, "num_kv_heads": 4}
CALLS = {
    "plain": of(**SIZES),
    "causal": of(**SIZES, is_causal=True),
    "grouped_queries": of(head_dim=16, num_heads=4, num_kv_heads=2, is_causal=True),
    "right_padding": of(**SIZES, batch=3, padding="right"),
    "random_padding": of(**SIZES, batch=2, padding="random"),
    "packed": of(**SIZES, documents=(4, 1, 1, 13, 5)),
    "xpos": of(**SIZES, xpos_scale_base=16.0, is_causal=True),
    "alibi": of(**SIZES, bias="alibi", is_causal=True),
    # Parts as whole sequences of their own, by Triton's kernels.
    "whole_segments": of_powers(**SIZES, is_causal=True),
}
CASES = {
    f"{name}_{str(dtype).removeprefix('torch.')}": partial(
        assert_parts_equal_whole,
        replace(call, device="cuda"),
        attend,
        dtype=dtype,
        **({"tolerance": HALF} if dtype == torch.bfloat16 else {}),
    )
    for name, call in CALLS.items()
    for dtype in (torch.float32, torch.bfloat16)
}
