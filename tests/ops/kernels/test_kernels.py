import pytest
import torch

from longnet_zoo.ops.kernels import (
    KERNELS,
    Call,
    capability_of,
    cudnn,
    efficient,
    math,
    refusal_of,
    sdpa,
    triton,
)
from longnet_zoo.ops.kernels.bias import LogitBias
from longnet_zoo.ops.kernels.call import BlockOptions, Dropout

SCALE = 0.3


def cpu_call(**changes):
    fields = {"device_type": "cpu", "dtype": torch.float32, "head_dim": 8, **changes}
    return Call(**fields)


def rows(dtype=torch.float64, requires_grad=False):
    return [torch.randn(2, 13, 3, 8, dtype=dtype, requires_grad=requires_grad) for _ in range(3)]


def joint_softmax(q, k, v, is_causal):
    """Out and LSE by plain autograd, with one more key of logit 0.5 and value 0."""
    logits = torch.einsum("bqud,bkud->buqk", q, k) * SCALE
    if is_causal:
        logits = logits.masked_fill(torch.ones(13, 13, dtype=torch.bool).triu(1), -torch.inf)
    logits = torch.cat([logits, torch.full_like(logits[..., :1], 0.5)], -1)
    out = torch.einsum("buqk,bkud->bqud", logits.softmax(-1)[..., :-1], v)
    return out, logits.logsumexp(-1).transpose(1, 2)


@pytest.mark.parametrize("kernel", [sdpa, math])
@pytest.mark.parametrize("is_causal", [False, True])
def test_backward_takes_out_and_lse_of_a_larger_softmax(kernel, is_causal):
    q, k, v = rows(requires_grad=True)
    out, lse = joint_softmax(q, k, v, is_causal)
    out_grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, (q, k, v), out_grad, retain_graph=True)
    tensors = [x.detach() for x in (out_grad, q, k, v, out, lse)]
    grads = kernel.backward(*tensors, BlockOptions(scale=SCALE, is_causal=is_causal))
    torch.testing.assert_close(grads, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("is_causal", [False, True])
def test_kernels_agree_on_strided_rows(is_causal):
    q, k, v = (x[:, ::2, 1:] for x in rows())
    options = BlockOptions(scale=SCALE, is_causal=is_causal)
    expected = math.forward(q, k, v, options)
    found = sdpa.forward(q, k, v, options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_math_in_chunks_equals_one_chunk(monkeypatch):
    q, k, v = rows()
    options = BlockOptions(scale=SCALE, is_causal=True)
    whole = math.forward(q, k, v, options)
    grads = math.backward(q, q, k, v, *whole, options)
    monkeypatch.setattr(math, "_MIN_ROWS", 3)
    monkeypatch.setattr(math, "_MAX_LOGITS", 1)
    torch.testing.assert_close(math.forward(q, k, v, options), whole)
    again = math.backward(q, q, k, v, *whole, options)
    torch.testing.assert_close(again, grads)


@pytest.mark.parametrize("kernel", [sdpa, math])
@pytest.mark.parametrize("num_keys", [1, 7, 29])
def test_keys_may_be_more_or_fewer_than_queries(kernel, num_keys, monkeypatch):
    monkeypatch.setattr(math, "_MIN_ROWS", 3)
    monkeypatch.setattr(math, "_MAX_LOGITS", 1)
    q = torch.randn(2, 13, 3, 8, dtype=torch.float64, requires_grad=True)
    k, v = torch.randn(2, 2, num_keys, 3, 8, dtype=torch.float64, requires_grad=True).unbind()
    logits = torch.einsum("bqud,bkud->buqk", q, k) * SCALE
    out = torch.einsum("buqk,bkud->bqud", logits.softmax(-1), v)
    lse = logits.logsumexp(-1).transpose(1, 2)
    options = BlockOptions(scale=SCALE, is_causal=False)
    found = kernel.forward(*(x.detach() for x in (q, k, v)), options)
    torch.testing.assert_close(found, (out.detach(), lse.detach()), rtol=0, atol=1e-12)
    out_grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, (q, k, v), out_grad)
    grads = kernel.backward(*(x.detach() for x in (out_grad, q, k, v, out, lse)), options)
    torch.testing.assert_close(grads, expected, rtol=0, atol=1e-12)


def test_a_bias_by_distance_knows_where_the_keys_begin():
    table = torch.randn(1, 2 * 50 - 1, dtype=torch.float64)  # zero distance at place 49
    grad = torch.zeros_like(table)
    bias = LogitBias(row_step=3, key_offset=-12, by_distance=table, by_distance_grad=grad)
    logits = torch.zeros(1, 1, 2, 4, dtype=torch.float64)
    bias.add_to(logits, start=5)
    # Query rows 5 and 6 lie at 15 and 18, the keys at -12, -9, -6 and -3.
    distances = torch.tensor([[-27, -24, -21, -18], [-30, -27, -24, -21]])
    assert torch.equal(logits[0, 0], table[0, 49 + distances])
    bias.add_grad(torch.ones_like(logits), start=5)
    assert torch.equal(grad[0], torch.bincount(49 + distances.flatten(), minlength=99).double())


def test_hidden_rows_give_zero_and_minus_infinity():
    q, k, v = rows()
    is_hidden = torch.ones(2, 13, 3, dtype=torch.bool)
    bias = LogitBias(row_step=1, is_hidden=is_hidden)
    out, lse = math.forward(q, k, v, BlockOptions(scale=1.0, is_causal=False, bias=bias))
    assert out.eq(0).all()
    assert lse.isneginf().all()


def test_dropout_is_the_same_when_drawn_again():
    dropout = Dropout(probability=0.25, seed=(7, 0))
    factors = dropout.factors(torch.Size((50, 40)), 3, torch.device("cpu"))
    assert torch.equal(factors, dropout.factors(torch.Size((50, 40)), 3, torch.device("cpu")))
    assert not torch.equal(factors, dropout.factors(torch.Size((50, 40)), 4, torch.device("cpu")))
    assert factors.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert factors.mean().item() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    ("kernel", "changes", "reason"),
    [
        (sdpa, {"has_dense_bias": True}, "does not support a bias by pairs of positions"),
        (sdpa, {"has_distance_bias": True}, "does not support a bias by distance"),
        (sdpa, {"has_hidden_keys": True}, "does not support padding before or between tokens"),
        (sdpa, {"has_dropout": True}, "does not support attention dropout"),
        (sdpa, {"has_lse_grad": True}, "does not support a gradient through the LSE"),
        (sdpa, {"device_type": "mps"}, "needs a device among ('cpu', 'cuda'), got 'mps'"),
        (sdpa, {"dtype": torch.complex64}, "does not support torch.complex64"),
        (sdpa, {"device_type": "cuda", "dtype": torch.half, "head_dim": 12}, "got 12"),
        (triton, {"is_block": True}, "attends to whole sequences, not to blocks"),
        (efficient, {}, "needs a CUDA device, got 'cpu'"),
        (efficient, {"device_type": "cuda", "dtype": torch.double}, "torch.float64"),
        (efficient, {"device_type": "cuda", "head_dim": 12}, "divisible by 8, got 12"),
        (cudnn, {}, "needs a CUDA device, got 'cpu'"),
        (cudnn, {"device_type": "cuda"}, "does not support torch.float32"),
        (cudnn, {"device_type": "cuda", "dtype": torch.half, "head_dim": 136}, "got 136"),
    ],
)
def test_a_kernel_says_what_it_does_not_support(kernel, changes, reason):
    assert reason in kernel.supports(cpu_call(**changes))


def test_what_the_schedule_does_itself_is_no_matter_of_the_kernel():
    assert sdpa.supports(cpu_call(has_unnested_xpos=True, is_backward=True)) is None


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sdpa", "cudnn", "efficient", "flash2", "flash3", "flash4"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_kernels_agree_with_math(name, is_causal, dtype):
    kernel, capability = KERNELS[name], capability_of(torch.device("cuda"))
    call = Call(device_type="cuda", dtype=dtype, head_dim=64, capability=capability)
    if refusal := refusal_of(kernel, call):
        pytest.skip(f"{name} {refusal.reason}")
    shape = (2, 301, 4, 64)
    q, k, v, out_grad = (torch.randn(shape, device="cuda", dtype=dtype)[:, ::3] for _ in range(4))
    options = BlockOptions(scale=0.125, is_causal=is_causal)
    out, lse = math.forward(q, k, v, options)
    found = kernel.forward(q, k, v, options)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(found, (out, lse), **tolerance)
    joint = (out / 2, lse + 0.7)
    expected = math.backward(out_grad, q, k, v, *joint, options)
    grads = kernel.backward(out_grad, q, k, v, *joint, options)
    torch.testing.assert_close(grads, expected, **tolerance)
