"""Cases of test_parallelize.py, run by every rank."""

from __future__ import annotations

import copy
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from longnet_zoo.factory import create_model
from longnet_zoo.layers import MemorySaving
from longnet_zoo.ops.pattern import DilatedPattern
from longnet_zoo.parallel import (
    ParallelAttention,
    all_to_all_attention,
    gather_sequence,
    parallelize,
    positions_of,
    shard_padding_mask,
    shard_sequence,
)
from tests.models.families import FAMILIES, MASKED_FAMILIES, PATTERN, TEXT, VOCAB_SIZE

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
SEQ_LEN = 37
DENSE = {"segment_lengths": (2**30,), "dilation_rates": (1,)}
ALL = {**FAMILIES, **MASKED_FAMILIES}
MODELS = {name: family for name, family in ALL.items() if name != "attention_layer"}


def mesh_of(size: int | None = None):
    return init_device_mesh("cpu", (size or dist.get_world_size(),))


def gradients(model, out):
    """Gradients of all parameters for a sum against a random cotangent; None for unused ones."""
    torch.manual_seed(1)
    return torch.autograd.grad(
        (out * torch.randn(out.shape)).sum(), tuple(model.parameters()), allow_unused=True
    )


def averaged(model, out):
    """The same from a backward pass, whose hooks average over the ranks."""
    torch.manual_seed(1)
    (out * torch.randn(out.shape)).sum().backward()
    return [parameter.grad for parameter in model.parameters()]


def assert_gradients(model, found, expected):
    for (name, _), one, other in zip(model.named_parameters(), found, expected, strict=True):
        if one is not None:
            # Of the largest entry: sums over many tokens cancel to small ones.
            other = torch.zeros_like(one) if other is None else other
            scale = other.abs().max().clamp(min=1)
            torch.testing.assert_close(
                one / scale, other / scale, **TOLERANCE, msg=lambda text, n=name: f"{n}: {text}"
            )
        assert one is not None or other is None, name


def whole_inputs(name, *, saving=None, **options):
    """Every rank passes whole inputs: outputs and gradients are those of one process."""
    family = MODELS[name]
    torch.manual_seed(0)
    model = family.make().train()
    inputs = family.draw(SEQ_LEN)
    expected = family.call(model, *inputs)
    expected_grads = gradients(model, expected)
    parallelize(model, mesh_of(), **options)
    if saving is not None:
        model.set_memory_saving(saving)
    out = family.call(model, *inputs)
    torch.testing.assert_close(out, expected, **TOLERANCE)
    assert_gradients(model, averaged(model, out), expected_grads)


def text_model(name="longnet_lm_tiny", **options):
    return create_model(name, **{**TEXT, **PATTERN, "ffn_dim": 40, "num_layers": 2, **options})


def parts_of_text(
    name="longnet_lm_tiny",
    *,
    reduction="mean",
    layout="contiguous",
    saving=None,
    method="dilated",
    **model_options,
):
    """Every rank passes its part: the loss and gradients are those of all tokens."""
    torch.manual_seed(0)
    model = text_model(name, **model_options)
    tokens, labels = torch.randint(VOCAB_SIZE, (2, 2, SEQ_LEN)).unbind()
    labels = labels.masked_fill(torch.rand(labels.shape) < 0.2, -100)
    expected = model.loss(tokens, labels, reduction=reduction)
    expected_grads = torch.autograd.grad(expected, tuple(model.parameters()))
    mesh = mesh_of()
    parallelize(model, mesh, inputs="sharded", method=method, layout=layout)
    model.set_memory_saving(saving)
    shard = partial(shard_sequence, mesh=mesh, layout=layout)
    mask = shard_padding_mask(None, SEQ_LEN, 2, mesh, layout)
    loss = model.loss(
        shard(tokens), shard(labels, pad_value=-100), reduction=reduction, key_padding_mask=mask
    )
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    loss.backward()
    assert_gradients(model, [p.grad for p in model.parameters()], expected_grads)


def parts_give_logits_of_parts():
    model = text_model()
    tokens = torch.randint(VOCAB_SIZE, (2, SEQ_LEN))
    expected = model(tokens)
    mesh = mesh_of()
    parallelize(model, mesh, inputs="sharded")
    mask = shard_padding_mask(None, SEQ_LEN, 2, mesh)
    logits = model(shard_sequence(tokens, mesh), key_padding_mask=mask)
    found = gather_sequence(logits, mesh, seq_len=SEQ_LEN)
    torch.testing.assert_close(found, expected, **TOLERANCE)


def accumulated_gradients():
    """Two backward passes before a step: each is averaged once."""
    torch.manual_seed(0)
    model = text_model()
    batches = torch.randint(VOCAB_SIZE, (2, 2, SEQ_LEN))
    loss = sum(model.loss(tokens, tokens, reduction="sum") for tokens in batches)
    expected = torch.autograd.grad(loss, tuple(model.parameters()))
    parallelize(model, mesh_of())
    for tokens in batches:
        model.loss(tokens, tokens, reduction="sum").backward()
    assert_gradients(model, [p.grad for p in model.parameters()], expected)


def all_to_all(case, *args, **options):
    """Runs a case, or sees it refused where the ranks do not divide the 4 heads."""
    if 4 % dist.get_world_size() == 0:
        return case(*args, method="all_to_all", **options)
    with pytest.raises(ValueError, match=r"got 3 processes and num_heads=4. Nearest: 2 or 4"):
        case(*args, method="all_to_all", **options)


def refusals():
    """Every rank says what is wrong and what would do, before anything is computed."""
    mesh, size = mesh_of(), dist.get_world_size()
    cube = init_device_mesh("cpu", (1, size), mesh_dim_names=("data", "sequence"))
    images = MODELS["longvit"].make()
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


def gradients_of_what_comes_before():
    """Inputs, and modules in front of a model, get the gradient that one process would find."""
    torch.manual_seed(0)
    model, front = text_model(), torch.nn.Linear(5, 24)
    x = torch.randn(2, SEQ_LEN, 5, requires_grad=True)
    inputs = (x, *front.parameters())
    expected = model(inputs_embeds=front(x))
    factors = torch.randn(expected.shape)
    expected_grads = torch.autograd.grad((expected * factors).sum(), inputs)
    parallelize(model, mesh_of())
    grads = torch.autograd.grad((model(inputs_embeds=front(x)) * factors).sum(), inputs)
    for one, other in zip(grads, expected_grads, strict=True):
        scale = other.abs().max()
        torch.testing.assert_close(one / scale, other / scale, **TOLERANCE)


def new_parameters_are_averaged_too():
    """Unfrozen, replaced and copied ones; before a forward pass each is looked for."""
    torch.manual_seed(0)
    model = text_model(tie_embeddings=False)
    model.requires_grad_(False)
    tokens, labels = torch.randint(VOCAB_SIZE, (2, 2, SEQ_LEN)).unbind()
    parallelize(model, mesh_of(), inputs="sharded")
    model.requires_grad_(True)
    torch.manual_seed(1)
    model.reset_classifier(VOCAB_SIZE)
    alone = text_model(tie_embeddings=False)
    alone.load_state_dict(model.state_dict())
    expected = torch.autograd.grad(alone.loss(tokens, labels), tuple(alone.parameters()))
    copied = copy.deepcopy(model)
    mask = shard_padding_mask(None, SEQ_LEN, 2, mesh_of())
    part = shard_sequence(tokens, mesh_of()), shard_sequence(labels, mesh_of(), pad_value=-100)
    for one in (model, copied):
        one.loss(*part, key_padding_mask=mask).backward()
        assert_gradients(one, [p.grad for p in one.parameters()], expected)


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


def heads_of_ranks_drop_apart():
    """Heads that other ranks have draw other weights, though the generators are alike."""
    torch.manual_seed(0)
    q, k = torch.zeros(2, 1, 4, 4, 8)
    v = torch.randn(1, 4, 1, 8).expand(1, 4, 4, 8)
    if 4 % dist.get_world_size() == 0:
        pattern = DilatedPattern(segment_lengths=(64,), dilation_rates=(1,))
        torch.manual_seed(5)
        out = all_to_all_attention(q, k, v, pattern, mesh_of(), dropout_p=0.5)
        assert not torch.equal(out[:, :, 0], out[:, :, -1])


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


def one_style_for_each_attention():
    """`parallelize_module` on the layers themselves: x is the part, with its own positions."""
    model, mesh = text_model(), mesh_of()
    x = torch.randn(2, 8 * dist.get_world_size(), 24)
    expected = model.stack.blocks[0].attention(x)
    plan = {"stack.blocks.*.attention": ParallelAttention("dilated")}
    parallelize_module(model, mesh, plan)
    positions = positions_of(mesh.get_local_rank(), mesh.size(), 8)
    part = shard_sequence(x, mesh)
    out = model.stack.blocks[0].attention(part, rotary=model.stack.rotary(positions))
    torch.testing.assert_close(gather_sequence(out, mesh), expected, **TOLERANCE)


def intermediate_states():
    """What blocks return is gathered, too."""
    model = MODELS["longvit"].make()
    images = MODELS["longvit"].draw(SEQ_LEN)[0]
    expected = model.get_intermediate_layers(images, 1)[0]
    parallelize(model, mesh_of())
    torch.testing.assert_close(model.get_intermediate_layers(images, 1)[0], expected, **TOLERANCE)


def parts_of_a_sample_skip_blocks_together():
    model = text_model(drop_path=0.5).train()
    tokens = torch.zeros(8, 3 * dist.get_world_size(), dtype=torch.int64)
    parallelize(model, mesh_of(), inputs="sharded", average_gradients=False)
    torch.manual_seed(dist.get_rank())  # every rank draws something else
    seen = []
    for block in model.stack.blocks:
        block.drop_path.register_forward_hook(lambda *args: seen.append(args[2]))
    model(shard_sequence(tokens, mesh_of()))
    mine = torch.stack(seen)
    assert mine.unique().tolist() == [0.0, 2.0]
    shared = mine.clone()
    dist.broadcast(shared, src=0)
    assert torch.equal(mine, shared)
    model.eval()(shard_sequence(tokens, mesh_of()))
    assert torch.stack(seen[len(mine) :]).eq(1).all()


def attention_is_kept():
    """With `keep_attention` nothing travels again in the backward pass but gradients."""
    counts = {}
    for keep in (False, True):
        model = parallelize(text_model(), mesh_of(), average_gradients=False)
        model.set_memory_saving(MemorySaving(chunk_size=None, keep_attention=keep))
        loss = model(torch.zeros(1, 8 * dist.get_world_size(), dtype=torch.int64)).sum()
        with mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as send:
            loss.backward()
        counts[keep] = send.call_count
    assert counts == {False: 4, True: 2}  # two layers


def compiled_parts():
    """A compiled loss over parts: one graph, with its collectives and gradients."""
    torch.manual_seed(0)
    model = text_model()
    tokens = torch.randint(VOCAB_SIZE, (1, 8 * dist.get_world_size()))
    expected = model.loss(tokens, tokens, reduction="sum")
    expected_grads = torch.autograd.grad(expected, tuple(model.parameters()))
    parallelize(model, mesh_of(), inputs="sharded")
    loss_of = torch.compile(model.loss, backend="aot_eager", fullgraph=True)
    part = shard_sequence(tokens, mesh_of())
    loss = loss_of(part, part, reduction="sum")
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    loss.backward()
    assert_gradients(model, [p.grad for p in model.parameters()], expected_grads)


def compiled_whole_inputs():
    """With padding, which is read between graphs."""
    torch.manual_seed(0)
    model = text_model()
    tokens = torch.randint(VOCAB_SIZE, (1, SEQ_LEN))
    expected = model(tokens)
    expected_grads = gradients(model, expected)
    parallelize(model, mesh_of())
    out = torch.compile(model, backend="aot_eager")(tokens)
    torch.testing.assert_close(out, expected, **TOLERANCE)
    assert_gradients(model, averaged(model, out), expected_grads)


CASES = {
    "compiled_parts": compiled_parts,
    "compiled_whole_inputs": compiled_whole_inputs,
    "refusals": refusals,
    "parts_of_other_shapes": parts_of_other_shapes,
    "whole_inputs_that_differ": whole_inputs_that_differ,
    "gradients_of_what_comes_before": gradients_of_what_comes_before,
    "new_parameters_are_averaged_too": new_parameters_are_averaged_too,
    "refusals_change_nothing": refusals_change_nothing,
    "heads_of_ranks_drop_apart": heads_of_ranks_drop_apart,
    "bad_masks_and_bounds": bad_masks_and_bounds,
    "one_style_for_each_attention": one_style_for_each_attention,
    "intermediate_states": intermediate_states,
    "parts_of_a_sample_skip_blocks_together": parts_of_a_sample_skip_blocks_together,
    "attention_is_kept": attention_is_kept,
    **{f"whole_{name}": partial(whole_inputs, name) for name in MODELS},
    "whole_memory_saving": partial(whole_inputs, "decoder_loss", saving=MemorySaving(chunk_size=5)),
    "whole_attention_kept": partial(
        whole_inputs, "beit3_pair", saving=MemorySaving(chunk_size=5, keep_attention=True)
    ),
    "text_mean": parts_of_text,
    "text_sum": partial(parts_of_text, reduction="sum"),
    "text_encoder": partial(parts_of_text, "longnet_mlm_tiny"),
    "text_alibi": partial(parts_of_text, position="alibi"),
    "text_relative": partial(parts_of_text, position="relative"),
    "text_grouped_queries": partial(parts_of_text, num_kv_heads=2),
    "text_memory_saving": partial(
        parts_of_text, saving=MemorySaving(chunk_size=3, keep_attention=True)
    ),
    "text_ring": partial(parts_of_text, method="ring", **DENSE),
    "text_ring_striped": partial(parts_of_text, method="ring", layout="striped", **DENSE),
    "text_ring_zigzag": partial(parts_of_text, method="ring", layout="zigzag", **DENSE),
    "text_logits": parts_give_logits_of_parts,
    "accumulated_gradients": accumulated_gradients,
    "all_to_all_whole": partial(all_to_all, whole_inputs, "decoder_loss"),
    "all_to_all_slides": partial(all_to_all, whole_inputs, "slides_padded"),
    "all_to_all_packed": partial(all_to_all, whole_inputs, "encoder_packed"),
    "all_to_all_text": partial(all_to_all, parts_of_text),
    "all_to_all_alibi": partial(all_to_all, parts_of_text, position="alibi"),
    "all_to_all_grouped": partial(all_to_all, parts_of_text, num_kv_heads=2),
}
