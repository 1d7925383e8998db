"""What is refused, on every rank, before anything is computed; cases of model_cases.py."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from longnet_zoo.parallel import ParallelAttention, parallelize
from tests.models.families import FAMILIES, VOCAB_SIZE
from tests.parallel.models import mesh_of, text_model


def refusals():
    """Every rank says what is wrong and what would do, before anything is computed."""
    mesh, size = mesh_of(), dist.get_world_size()
    cube = init_device_mesh("cpu", (1, size), mesh_dim_names=("data", "sequence"))
    images = FAMILIES["longvit"].make()
    for message, model, options in (
        ("method must be one of .*got 'rings'", text_model(), {"method": "rings"}),
        ("layout must be one of .*got 'round'", text_model(), {"layout": "round"}),
        ("layout='striped' is for method='ring'", text_model(), {"layout": "striped"}),
        ("inputs must be one of .*got 'half'", text_model(), {"inputs": "half"}),
        ("those with a cross_entropy_op, got LongViT", images, {"inputs": "sharded"}),
        (
            "needs one branch of rate 1.*got .*16.*method='dilated'",
            text_model(),
            {"method": "ring"},
        ),
        ("loss_mesh is for inputs='sharded'", text_model(), {"loss_mesh": mesh}),
        ("model must have a stack of blocks, got Linear", torch.nn.Linear(2, 2), {}),
    ):
        before = dict(vars(model))
        with pytest.raises(ValueError, match=message):
            parallelize(model, mesh, **options)
        assert vars(model) == before
    with pytest.raises(ValueError, match="a model is spread once, got a LongNetLM"):
        parallelize(parallelize(text_model(), mesh), mesh)
    with pytest.raises(ValueError, match=r"mesh must have one dimension.*mesh\['sequence'\]"):
        parallelize(text_model(), cube)
    with pytest.raises(ValueError, match="got Linear without any"):
        parallelize_module(torch.nn.Linear(2, 2), mesh, ParallelAttention())
    short = text_model(segment_lengths=(20,), dilation_rates=(1,))
    parallelize(short, mesh, method="ring")
    with pytest.raises(ValueError, match=f"a sequence of {20 + -20 % size + size} tokens"):
        short(torch.zeros(1, 20 + -20 % size + size, dtype=torch.int64))


def parts_of_other_shapes():
    model = parallelize(text_model(), mesh_of(), inputs="sharded")
    for length in (5, 6):  # as if both had been seen
        model(torch.zeros(1, length, dtype=torch.int64))
    length = 5 + (dist.get_rank() == 1)
    with pytest.raises(ValueError, match="the same number of tokens, got 5, 6"):
        model(torch.zeros(1, length, dtype=torch.int64))


def whole_inputs_that_differ():
    """Refused on all ranks, where one would wait for the other."""
    model, is_last = parallelize(text_model(), mesh_of()), dist.get_rank() + 1 == mesh_of().size()
    tokens = torch.zeros(1, 12, dtype=torch.int64)
    mask = torch.zeros(1, 12, dtype=torch.bool)
    bounds = torch.tensor([0, 3 + is_last, 12], dtype=torch.int32)
    for message, length, options in (
        ("number of tokens, got 12.*11", 12 - is_last, {}),
        ("key_padding_mask .*got 0.*1", 12, {"key_padding_mask": mask if is_last else None}),
        ("the same cu_seqlens", 12, {"cu_seqlens": bounds}),
    ):
        with pytest.raises(ValueError, match=message):
            model(tokens[:, :length], **options)
    bounds = torch.tensor([0, 3, 12], dtype=torch.int32)
    with pytest.raises(ValueError, match="not both"):
        model(tokens, cu_seqlens=bounds, key_padding_mask=mask)
    with pytest.raises(ValueError, match="at most 11"):
        model(tokens[:, :11], cu_seqlens=bounds)
    with pytest.raises(ValueError, match="must end at seq_len=12, got \\[0, 3\\]"):
        model(tokens, cu_seqlens=bounds[:2])


def refusals_change_nothing():
    mesh, tokens = mesh_of(), torch.randint(VOCAB_SIZE, (1, 12))
    for options in ({"method": "ring"}, {"method": "all_to_all"}):
        model = text_model(num_heads=1)
        before = model.loss(tokens, tokens, reduction="sum")
        with pytest.raises(ValueError, match="needs"):
            parallelize(model, mesh, inputs="sharded", **options)
        assert torch.equal(model.loss(tokens, tokens, reduction="sum"), before)
    with pytest.raises(ValueError, match="after it is spread"):
        parallelize(torch.compile(text_model()), mesh)
    with pytest.raises(TypeError, match=r"must be a DeviceMesh.*got NoneType"):
        parallelize(text_model(), None)


def bad_masks_and_bounds():
    model = parallelize(text_model(), mesh_of(), inputs="sharded")
    tokens = torch.zeros(1, 5, dtype=torch.int64)
    total = 5 * dist.get_world_size()
    for error, message, options in (
        (ValueError, "must be bool .*got torch.float32", {"key_padding_mask": torch.zeros(1, 5)}),
        (TypeError, "must be int32", {"cu_seqlens": torch.tensor([0, total])}),
        (ValueError, f"at most {total}", {"cu_seqlens": torch.tensor([0, total + 1]).int()}),
        (
            ValueError,
            "not both",
            {
                "cu_seqlens": torch.tensor([0, total]).int(),
                "key_padding_mask": torch.zeros(1, 5, dtype=torch.bool),
            },
        ),
    ):
        with pytest.raises(error, match=message):
            model(tokens, **options)


CASES = {
    "refusals": refusals,
    "parts_of_other_shapes": parts_of_other_shapes,
    "whole_inputs_that_differ": whole_inputs_that_differ,
    "refusals_change_nothing": refusals_change_nothing,
    "bad_masks_and_bounds": bad_masks_and_bounds,
}
