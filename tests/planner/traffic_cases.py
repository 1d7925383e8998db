"""Bytes counted on real steps, against those of the plan; run by `test_traffic.py`."""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from longnet_zoo.layers import MemorySaving
from longnet_zoo.planner import PlanConfig, describe, layer_traffic, plan_step
from tests.parallel.traffic import counting
from tests.planner.training import DENSE, make_step

SMALL = {"vocab_size": 100, "embed_dim": 48, "num_layers": 2, "num_heads": 12, "ffn_dim": 60}
ACROSS = {"segment_lengths": (16, 60, 300), "dilation_rates": (1, 3, 7)}
KINDS = {"dilated": "all_to_all", "ring": "message", "all_to_all": "all_to_all"}


def check_bytes(method, *, saving=None, precision="32-true", layout="contiguous", **options):
    """Counts a step of all layers on every rank."""
    size = dist.get_world_size()
    config = PlanConfig(
        model="longnet_lm_tiny",
        options={**SMALL, **options},
        seq_len=61 * size,
        gpus=size,
        precision=precision,
        memory_saving=saving,
        layout=layout,
    )
    _, step = make_step(config, method)
    with counting() as traffic:
        step()
    network = describe(config.model, config.options)
    planned = layer_traffic(
        method,
        pattern=network.pattern,
        seq_len=config.seq_len,
        num_ranks=size,
        num_heads=network.num_heads,
        num_kv_heads=network.num_kv_heads,
        head_dim=network.head_dim,
        is_causal=network.is_causal,
        item_size=2 if precision == "bf16-true" else 4,
        layout=layout,
    )
    rank, runs = dist.get_rank(), 1 if saving is None else 2
    expected = runs * planned.forward_sent[rank] + planned.backward_sent[rank]
    assert traffic.sent[KINDS[method]] == network.num_layers * expected
    # What all ranks send, all ranks receive; and there is something to count.
    for sent, received in (
        (planned.forward_sent, planned.forward_received),
        (planned.backward_sent, planned.backward_received),
    ):
        assert sent.sum() == received.sum() > 0


def dilated():
    check_bytes("dilated", **ACROSS)


def dilated_with_shared_keys_in_half():
    check_bytes("dilated", **ACROSS, num_kv_heads=2, precision="bf16-true")


def dilated_run_again():
    check_bytes("dilated", **ACROSS, saving=MemorySaving(chunk_size=16))


def ring():
    check_bytes("ring", **DENSE)


def ring_striped_with_shared_keys_in_half():
    check_bytes("ring", **DENSE, layout="striped", num_kv_heads=3, precision="bf16-true")


def ring_zigzag_run_again():
    check_bytes("ring", **DENSE, layout="zigzag", saving=MemorySaving(chunk_size=None))


def all_to_all():
    check_bytes("all_to_all", **ACROSS)


def all_to_all_with_shared_keys_in_half():
    check_bytes("all_to_all", **ACROSS, num_kv_heads=2, precision="bf16-true")


def averaged_gradients():
    config = _config(fsdp=False)
    _, step = make_step(config, "dilated", average_gradients=True)
    with counting() as traffic:
        step()
    loss = 2 * 2 * (config.gpus - 1) * 4 // config.gpus  # a number, summed in both passes
    planned = plan_step(config, longest=False).methods[0].parameter_bytes
    # Parameters whose bytes the ranks cannot share out evenly are rounded.
    assert abs(traffic.sent["all_reduce"] - loss - planned) <= 64


def sharded_parameters():
    config = _config(fsdp=True)
    model, step = make_step(config, "dilated")
    for block in model.stack.blocks:
        fully_shard(block)
    fully_shard(model)

    torch.distributed.fsdp.register_fsdp_forward_method(model, "loss")
    for parameter in model.parameters():
        parameter.grad = None
    with counting() as traffic:
        step()
    planned = plan_step(config, longest=False).methods[0].parameter_bytes
    counted = traffic.sent["all_gather"] + traffic.sent["reduce_scatter"]
    assert counted == planned, f"{dict(traffic.sent)}, planned {planned}"


def _config(*, fsdp):
    size = dist.get_world_size()
    # Rows of every parameter can be shared out evenly among 2, 3 and 4 ranks.
    options = {**SMALL, **ACROSS, "vocab_size": 120}
    return PlanConfig(
        model="longnet_lm_tiny",
        options=options,
        seq_len=60 * size,
        gpus=size,
        precision="32-true",
        memory_saving=None,
        fsdp=fsdp,
    )


CASES = {
    case.__name__: case
    for case in (
        dilated,
        dilated_with_shared_keys_in_half,
        dilated_run_again,
        ring,
        ring_striped_with_shared_keys_in_half,
        ring_zigzag_run_again,
        all_to_all,
        all_to_all_with_shared_keys_in_half,
        averaged_gradients,
        sharded_parameters,
    )
}
