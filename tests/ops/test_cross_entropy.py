"""Chunked cross-entropy against the whole logits, in value, gradients and memory."""

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from longnet_zoo.ops import cross_entropy as cross_entropy_module
from longnet_zoo.ops.cross_entropy import linear_cross_entropy

VOCAB_SIZE, EMBED_DIM = 23, 7


def make_inputs(dtype=torch.float64, ignored=(3, 4, 11)):
    features = torch.randn(3, 5, EMBED_DIM, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCAB_SIZE, EMBED_DIM, dtype=dtype, requires_grad=True)
    bias = torch.randn(VOCAB_SIZE, dtype=dtype, requires_grad=True)
    labels = torch.randint(VOCAB_SIZE, (3, 5))
    labels.view(-1)[list(ignored)] = -100
    return features, weight, bias, labels


def full_loss(features, weight, labels, bias, reduction, ignore_index=-100):
    logits = functional.linear(features, weight, bias).float()
    if features.dtype == torch.float64:
        logits = functional.linear(features, weight, bias)
    return functional.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), reduction=reduction, ignore_index=ignore_index
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk_size", [1, 4, 15, 1000, None])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("ignored", [(), (3, 4, 11)])
def test_equals_the_loss_of_all_logits(reduction, chunk_size, has_bias, ignored):
    features, weight, bias, labels = make_inputs(ignored=ignored)
    bias = bias if has_bias else None
    leaves = [x for x in (features, weight, bias) if x is not None]
    loss = linear_cross_entropy(
        features, weight, labels, bias=bias, chunk_size=chunk_size, reduction=reduction
    )
    expected = full_loss(features, weight, labels, bias, reduction).view(loss.shape)
    cotangent = torch.randn_like(loss)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(loss, leaves, cotangent),
        torch.autograd.grad(expected, leaves, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def test_gradcheck():
    features, weight, bias, labels = make_inputs()
    assert torch.autograd.gradcheck(
        lambda *x: linear_cross_entropy(
            x[0], x[1], labels, bias=x[2], chunk_size=4, reduction="none"
        ),
        (features, weight, bias),
    )


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_only_asked_gradients_are_made(frozen):
    features, weight, bias, labels = make_inputs()
    leaves = [features, weight, bias]
    leaves[frozen].requires_grad_(False)
    linear_cross_entropy(features, weight, labels, bias=bias).backward()
    assert [leaf.grad is None for leaf in leaves] == [i == frozen for i in range(3)]


def test_large_logits_stay_finite():
    features, weight, _, labels = make_inputs(torch.float32)
    loss = linear_cross_entropy(features * 1e4, weight, labels)
    torch.testing.assert_close(loss, full_loss(features * 1e4, weight, labels, None, "mean"))
    assert loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_have_a_float32_loss(dtype):
    features, weight, bias, labels = make_inputs(dtype)
    loss = linear_cross_entropy(features, weight, labels, bias=bias, chunk_size=4)
    assert loss.dtype == torch.float32
    exact = [x.detach().double().requires_grad_() for x in (features, weight, bias)]
    expected = full_loss(exact[0], exact[1], labels, exact[2], "mean")
    plain = full_loss(features, weight, labels, bias, "mean")
    assert (loss - expected).abs() <= 2 * (plain - expected).abs() + 1e-3
    ours = torch.autograd.grad(loss, (features, weight, bias))
    theirs = torch.autograd.grad(plain, (features, weight, bias))
    truth = torch.autograd.grad(expected, exact)
    for our, their, true in zip(ours, theirs, truth, strict=True):
        assert our.dtype == dtype
        rounding = torch.finfo(dtype).eps * true.abs().max()
        assert (our - true).abs().max() <= 2 * (their - true).abs().max() + rounding


def test_gradient_sums_over_chunks_do_not_round_to_half():
    """With one row per chunk, rounding the running sum to bfloat16 would stall it."""
    features = torch.ones(3000, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(3000, dtype=torch.int64)
    linear_cross_entropy(features, weight, labels, chunk_size=1, reduction="sum").backward()
    torch.testing.assert_close(
        weight.grad.float(), torch.tensor([[-1500.0], [1500.0]]), rtol=4e-3, atol=0
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_rows_ignored_give_zero_and_no_gradient(reduction):
    features, weight, bias, labels = make_inputs()
    loss = linear_cross_entropy(
        features, weight, torch.full_like(labels, -100), bias=bias, reduction=reduction
    )
    loss.backward()
    assert loss.item() == 0.0
    for leaf in (features, weight, bias):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_ignored_rows_get_no_loss_and_may_hold_nan():
    features, weight, _, labels = make_inputs()
    with torch.no_grad():
        features.view(-1, EMBED_DIM)[3] = float("nan")
    losses = linear_cross_entropy(features, weight, labels, reduction="none", chunk_size=4)
    losses.sum().backward()
    assert losses.view(-1)[[3, 4, 11]].tolist() == [0.0, 0.0, 0.0]
    assert losses.isfinite().all()
    assert weight.grad.isfinite().all()
    assert torch.equal(features.grad.view(-1, EMBED_DIM)[3], torch.zeros(EMBED_DIM).double())


def test_ignore_index_can_be_a_class():
    features, weight, _, labels = make_inputs(ignored=())
    labels[0] = 5
    loss = linear_cross_entropy(features, weight, labels, ignore_index=5)
    torch.testing.assert_close(
        loss, full_loss(features, weight, labels, None, "mean", ignore_index=5)
    )


def test_no_rows():
    loss = linear_cross_entropy(
        torch.zeros(0, 4), torch.randn(5, 4), torch.zeros(0, dtype=torch.int64), reduction="sum"
    )
    assert loss.item() == 0.0


def test_autocast_runs_the_products_in_half():
    features, weight, bias, labels = make_inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(features, weight, labels, bias=bias)
    half = [x.detach().bfloat16() for x in (features, weight, bias)]
    assert loss.dtype == torch.float32
    assert torch.equal(loss, linear_cross_entropy(half[0], half[1], labels, bias=half[2]))
    loss.backward()
    assert features.grad.dtype == weight.grad.dtype == torch.float32


def test_autocast_around_the_backward_changes_nothing():
    features, weight, bias, labels = make_inputs(torch.float32)
    loss = linear_cross_entropy(features, weight, labels, bias=bias, chunk_size=4)
    expected = torch.autograd.grad(loss, (features, weight, bias), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        grads = torch.autograd.grad(loss, (features, weight, bias))
    for grad, value in zip(grads, expected, strict=True):
        assert torch.equal(grad, value)


def test_meta_tensors_give_shapes_and_take_no_memory():
    features = torch.empty(2, 6, 4, device="meta", requires_grad=True)
    weight = torch.empty(5, 4, device="meta", requires_grad=True)
    labels = torch.empty(2, 6, device="meta", dtype=torch.int64)
    loss = linear_cross_entropy(features, weight, labels)
    loss.backward()
    assert loss.shape == ()
    assert features.grad.shape == features.shape
    assert weight.grad.shape == weight.shape


def test_compiles_to_the_eager_result():
    features, weight, bias, labels = make_inputs(torch.float32)
    leaves = (features, weight, bias)

    def loss_function(features, weight, bias):
        return linear_cross_entropy(features, weight, labels, bias=bias, chunk_size=4)

    expected = loss_function(*leaves)
    loss = torch.compile(loss_function, fullgraph=True)(*leaves)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # Made by opcheck itself.
def test_custom_op_registrations():
    features, weight, bias, labels = make_inputs()
    rows = features.detach().flatten(0, 1).requires_grad_()
    torch.library.opcheck(
        torch.ops.longnet_zoo.linear_cross_entropy.default,
        (rows, weight, bias, labels.flatten(), -100, 4),
    )


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("ignored", [(), (3, 4, 11)])
def test_no_tensor_is_larger_than_a_chunk_of_logits(ignored):
    num_rows, vocab_size, chunk_size = 512, 1000, 8
    features, weight = torch.randn(num_rows, 4), torch.randn(vocab_size, 4)
    labels = torch.randint(vocab_size, (num_rows,))
    labels[list(ignored)] = -100
    options = (features, weight, None, labels)
    # A mode sees a custom op as one operation, so its two halves are called here.
    with LargestTensor() as forward:
        _, lse = cross_entropy_module._forward(*options, -100, chunk_size)
    with LargestTensor() as backward:
        cross_entropy_module._backward(
            torch.ones(num_rows), *options, lse, -100, chunk_size, [True, True, False]
        )
    assert forward.numel == backward.numel == chunk_size * vocab_size


def peak_bytes(function):
    """Largest sum of live allocations on the CPU while `function` runs."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("ignored", [(), (3, 4, 11)])
def test_peak_memory_is_that_of_one_chunk(ignored):
    size, chunk_size = 2048, 64
    features = torch.randn(size, 8, requires_grad=True)
    weight = torch.randn(size, 8, requires_grad=True)
    labels = torch.randint(size, (size,))
    labels[list(ignored)] = -100
    chunk_bytes = 4 * size * chunk_size

    def plain():
        functional.cross_entropy(features @ weight.T, labels).backward()

    def chunked():
        linear_cross_entropy(features, weight, labels, chunk_size=chunk_size).backward()

    # The second chunk's logits never lie beside the first one's; the rest are the gradients.
    assert chunk_bytes <= peak_bytes(chunked) < 1.6 * chunk_bytes
    assert peak_bytes(plain) > 2 * size // chunk_size * chunk_bytes


def test_default_chunk_of_a_large_vocabulary():
    """100,000 tokens x 100,000 classes would be 37 GiB; a default chunk is 64 MiB."""
    vocab_size, chunks = 100_000, []
    features, weight = torch.zeros(200, 1), torch.zeros(vocab_size, 1)
    labels = torch.zeros(200, dtype=torch.int64)

    class Chunks(LargestTensor):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.longnet_zoo.linear_cross_entropy.default:
                chunks.append(args[-1])
            return super().__torch_dispatch__(func, types, args, kwargs)

    with Chunks():
        linear_cross_entropy(features, weight, labels)
    assert chunks == [64 * 2**20 // (4 * vocab_size)]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.zeros(5, 3)}, ValueError, r"\(2, 6, 4\) and \(5, 3\)"),
        ({"weight": torch.zeros(5)}, ValueError, r"\(2, 6, 4\) and \(5,\)"),
        ({"labels": torch.zeros(2, 5).long()}, ValueError, r"\(2, 6\), got \(2, 5\)"),
        ({"labels": [[0] * 6] * 2}, TypeError, "labels must be an int64 tensor, got list"),
        ({"labels": torch.zeros(2, 6)}, TypeError, r"int64, got torch\.float32"),
        ({"bias": torch.zeros(4)}, ValueError, r"\(vocab_size,\) = \(5,\), got \(4,\)"),
        ({"bias": torch.zeros(5).half()}, TypeError, r"float32, torch\.float32, torch\.float16"),
        ({"weight": torch.zeros(5, 4).bfloat16()}, TypeError, r"torch\.float32, torch\.bfloat16"),
        ({"chunk_size": 0}, ValueError, "at least 1 row, got 0"),
        ({"reduction": "max"}, ValueError, r"\('mean', 'sum', 'none'\), got 'max'"),
        ({"labels": torch.full((2, 6), 5)}, ValueError, r"got 5 for vocab_size=5"),
        ({"labels": torch.full((2, 6), -1)}, ValueError, r"ignore_index=-100, got -1"),
    ],
)
def test_bad_input_is_refused(change, error, message):
    arguments = {
        "features": torch.zeros(2, 6, 4),
        "weight": torch.zeros(5, 4),
        "labels": torch.zeros(2, 6, dtype=torch.int64),
    }
    with pytest.raises(error, match=message):
        linear_cross_entropy(**(arguments | change))
