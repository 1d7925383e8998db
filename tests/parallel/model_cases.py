"""Cases of test_parallelize.py, run by every rank."""

from __future__ import annotations

import copy
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.parallel import parallelize_module

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
from tests.models.families import FAMILIES, MASKED_FAMILIES, VOCAB_SIZE
from tests.parallel import refusals
from tests.parallel.models import mesh_of, text_model

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
SEQ_LEN = 37
DENSE = {"segment_lengths": (2**30,), "dilation_rates": (1,)}
ALL = {**FAMILIES, **MASKED_FAMILIES}
# Those with one stack.
OTHERS = ("attention_layer", "clip_loss", "multimodal", "multimodal_padded")
MODELS = {name: ALL[name] for name in ALL if name not in OTHERS}


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


CASES = {
    **refusals.CASES,
    "gradients_of_what_comes_before": gradients_of_what_comes_before,
    "new_parameters_are_averaged_too": new_parameters_are_averaged_too,
    "heads_of_ranks_drop_apart": heads_of_ranks_drop_apart,
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
