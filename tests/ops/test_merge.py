import math

import torch

from longnet_zoo.ops.merge import add_zero_keys_, merge_


def softmax_parts(logits, values):
    return logits.softmax(-1) @ values, logits.logsumexp(-1)


def test_merge_is_the_softmax_over_both_key_sets():
    logits, values = torch.randn(5, 11, dtype=torch.float64), torch.randn(11, 3).double()
    out, lse = softmax_parts(logits[:, :4], values[:4])
    merge_(out, lse, *softmax_parts(logits[:, 4:], values[4:]))
    expected_out, expected_lse = softmax_parts(logits, values)
    torch.testing.assert_close(out, expected_out, rtol=0, atol=1e-14)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-14)


def test_merge_survives_extreme_lses():
    out, lse = torch.ones(4, 2), torch.tensor([1e4, -1e4, 0.0, -3e38])
    merge_(out, lse, torch.zeros(4, 2), torch.tensor([-1e4, 1e4, 0.0, -3e38]))
    torch.testing.assert_close(out[:, 0], torch.tensor([1.0, 0.0, 0.5, 0.5]))
    assert lse.isfinite().all()


def test_empty_parts_change_nothing():
    infinite = -math.inf
    out, lse = torch.tensor([[2.0], [0.0], [0.0]]), torch.tensor([0.0, infinite, infinite])
    merge_(out, lse, torch.tensor([[0.0], [3.0], [0.0]]), torch.tensor([infinite, 0.0, infinite]))
    assert out.flatten().tolist() == [2.0, 3.0, 0.0]
    assert lse.tolist() == [0.0, 0.0, infinite]


def test_merge_writes_only_the_rows_of_a_view():
    out, lse = torch.zeros(6, 2), torch.zeros(6)
    merge_(out[1::3], lse[1::3], torch.ones(2, 2), torch.full((2,), 100.0))
    assert out[:, 0].tolist() == [0, 1, 0, 0, 1, 0]
    assert lse.tolist() == [0, 100, 0, 0, 100, 0]


def test_half_precision_parts_join_in_float32():
    out, lse = torch.zeros(1, 1), torch.zeros(1)
    merge_(out, lse, torch.ones(1, 1, dtype=torch.bfloat16), torch.full((1,), math.log(2)))
    torch.testing.assert_close(out, torch.full((1, 1), 2 / 3))


def test_zero_keys_join_as_keys_of_zeros():
    logits, values = torch.randn(5, 4, dtype=torch.float64), torch.randn(4, 3).double()
    out, lse = softmax_parts(logits, values)
    add_zero_keys_(out, lse, 3)
    padded = torch.cat([logits, torch.zeros(5, 3).double()], 1)
    expected = softmax_parts(padded, torch.cat([values, torch.zeros(3, 3).double()]))
    torch.testing.assert_close((out, lse), expected, rtol=0, atol=1e-14)
