"""Without masks no pass waits for the GPU or copies from the host, so CUDA graphs are possible.

Seen without a GPU: fake tensors say that they are on one, and raise where a value would be read.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longnet_zoo.ops.arguments import can_read
from longnet_zoo.ops.joint_softmax import JointSoftmax
from longnet_zoo.ops.kernels import cudnn, efficient, math, sdpa
from longnet_zoo.ops.pattern import DilatedPattern
from longnet_zoo.ops.sequences import split_sequences

from .families import FAMILIES


class NoTransfers(TorchDispatchMode):
    """Raises at operations between devices, except with numbers that a kernel is handed."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        is_copy = "copy" in str(function)
        places = {x.device.type for x in tensors if x.ndim or is_copy}
        if len(places) > 1:
            raise AssertionError(f"{function} between {sorted(places)}")
        return out


def test_transfers_and_reads_are_seen():
    with FakeTensorMode(), NoTransfers():
        x = torch.ones(3, device="cuda")
        for copy in (
            lambda: torch.tensor([1.0, 2.0], device="cuda"),
            lambda: x.new_tensor(3.0),
            lambda: torch.arange(3).to("cuda"),
            x.cpu,
        ):
            with pytest.raises(AssertionError, match="between"):
                copy()
        for read in (x.sum().item, x.tolist, x.nonzero, lambda: torch.equal(x, x)):
            with pytest.raises(RuntimeError, match=r"nonzero|aten\.(equal|_local_scalar_dense)"):
                read()
        assert (2.0 * x + torch.tensor(1.0)).device.type == "cuda"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", FAMILIES)
def test_forward_runs_on_fake_tensors(name, device):
    """On a fake GPU without a transfer; on a fake CPU without a look at tokens or coordinates."""
    family = FAMILIES[name]
    with torch.device("meta"):
        model = family.make()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device):
        model, inputs = model.to_empty(device=device), family.draw(43)
        with NoTransfers():
            assert family.call(model, *inputs).device.type == device


@pytest.mark.parametrize("name", FAMILIES)
def test_training_step_stays_on_its_device(name):
    """On the meta device, since fake GPU tensors have no backward pass without a GPU."""
    family = FAMILIES[name]
    with torch.device("meta"):
        model, inputs = family.make(), family.draw(43)
        with NoTransfers():
            family.call(model, *inputs).sum().backward()
    gradients = [x.grad for x in model.parameters() if x.grad is not None]
    assert gradients
    assert all(x.is_meta for x in gradients)


CALLS = {
    "plain": {},
    "zero_keys": {"padded_keys": "zero"},
    "xpos": {"xpos_scale_base": 512.0},
    "xpos_of_unnested_segments": {"xpos_scale_base": 512.0, "segment_lengths": (7, 16, 30)},
    "distance_bias": {"distance_bias": (4, 2 * 32 - 1)},
    "dense_bias": {"dense_bias": (2, 4, 43, 43)},
}


def problem_of(kernel, q, **options):
    """The attention that a call of the op sets up, on the device of q."""
    pattern_options = {"segment_lengths": (8, 16, 32), "dilation_rates": (1, 2, 3)}
    pattern_options["head_offset"] = "block"
    for name in ("padded_keys", "segment_lengths"):
        if name in options:
            pattern_options[name] = options.pop(name)
    biases = {
        name: q.new_empty(options.pop(name), dtype=torch.float32) if name in options else None
        for name in ("distance_bias", "dense_bias")
    }
    groups, _ = split_sequences(q, None, None, is_single=biases["dense_bias"] is not None)
    defaults = {"xpos_scale_base": None, "is_hidden": None, "dropout_p": 0.0, "seed": 0}
    return JointSoftmax(
        pattern=DilatedPattern(**pattern_options),
        kernel=kernel,
        groups=groups,
        is_causal=False,
        scale=0.25,
        **{**defaults, **biases, **options},
    )


# What is done around the kernels is the same for all of them.
@pytest.mark.parametrize(
    ("kernel", "name"),
    [(math, name) for name in CALLS]
    + [(kernel, name) for kernel in (sdpa, cudnn, efficient) for name in ("plain", "zero_keys")],
    ids=lambda x: getattr(x, "NAME", x),
)
def test_attention_stays_on_the_gpu(kernel, name):
    with FakeTensorMode():
        q, k, v = torch.empty(3, 2, 43, 4, 16, device="cuda", dtype=torch.bfloat16).unbind()
        problem = problem_of(kernel, q, **CALLS[name])
        with NoTransfers():
            out, lse = problem.forward(q, k, v)
            grads = problem.backward(out, None, q, k, v, out, lse)
    assert out.shape == q.shape
    assert all(x.device.type == "cuda" for x in (out, lse, *grads[:3]))


class _Mask:
    """As much of a tensor on a GPU as `can_read` looks at."""

    is_cuda, is_meta = True, False


def test_values_cannot_be_read_while_a_graph_is_captured(monkeypatch):
    for is_capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda x=is_capturing: x)
        assert can_read(_Mask()) is not is_capturing
        assert can_read(torch.zeros(1))


def test_values_of_fake_tensors_cannot_be_read():
    assert not can_read(torch.zeros(1, device="meta"))
    with FakeTensorMode():
        assert not can_read(torch.zeros(1))
    assert can_read(torch.zeros(1))
