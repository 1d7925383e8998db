"""Peaks of memory of real steps of two ranks, against the plan; run by `test_memory.py`."""

import torch.distributed as dist

from benchmarks.measure import peak_extra_mib
from longnet_zoo.layers import MemorySaving
from longnet_zoo.planner import PlanConfig, plan_step
from longnet_zoo.planner.traffic import METHODS
from tests.planner.training import DENSE, make_step, uncounted_messages

SMALL = {"vocab_size": 100, "num_layers": 2}
ACROSS = {"segment_lengths": (512, 1536, 8192), "dilation_rates": (1, 3, 4)}


def check_peak(method, *, saving, rows=1600, precision="32-true", layout="contiguous", **options):
    """Compares the fullest rank with the plan, to 15 %."""
    config = PlanConfig(
        model="longnet_lm_tiny",
        options={**SMALL, **options},
        seq_len=rows * dist.get_world_size(),
        gpus=dist.get_world_size(),
        gpu="cpu",
        precision=precision,
        memory_saving=saving,
        layout=layout,
        fsdp=False,
    )
    _, step = make_step(config, method)
    with uncounted_messages():
        step()  # what is made once is made now
        # A message that a thread of gloo freed counts as held, so the least is right.
        peak = min(peak_extra_mib(step) for _ in range(2))
    peaks = [0.0] * config.gpus
    dist.all_gather_object(peaks, peak)
    plan = plan_step(config, longest=False).methods[METHODS.index(method)]
    ratio = plan.memory.activations / 2**20 / max(peaks)
    assert 0.85 < ratio < 1.15, f"planned / measured = {ratio:.3f}, measured {peaks} MiB"


def dilated():
    check_peak("dilated", saving=None, **ACROSS)


def dilated_with_shared_keys_in_chunks():
    check_peak("dilated", saving=MemorySaving(chunk_size=256), num_kv_heads=2, **ACROSS)


def dilated_run_again_in_half():
    saving = MemorySaving(chunk_size=None)
    check_peak("dilated", saving=saving, rows=600, precision="bf16-true", **ACROSS)


def dilated_with_attention_kept():
    check_peak("dilated", saving=MemorySaving(chunk_size=256, keep_attention=True), **ACROSS)


def ring_with_attention_kept():
    check_peak("ring", saving=MemorySaving(chunk_size=256, keep_attention=True), **DENSE)


def dilated_with_bias():
    check_peak("dilated", saving=None, position="relative", **ACROSS)


def ring_with_bias():
    check_peak("ring", saving=MemorySaving(chunk_size=256), rows=800, position="alibi", **DENSE)


def ring_in_chunks():
    check_peak("ring", saving=MemorySaving(chunk_size=256), **DENSE)


def ring_zigzag():
    check_peak("ring", saving=None, layout="zigzag", num_kv_heads=1, **DENSE)


def all_to_all():
    check_peak("all_to_all", saving=None, **ACROSS)


def all_to_all_run_again():
    check_peak("all_to_all", saving=MemorySaving(chunk_size=None), **ACROSS)


CASES = {
    case.__name__: case
    for case in (
        dilated,
        dilated_with_shared_keys_in_chunks,
        dilated_run_again_in_half,
        dilated_with_attention_kept,
        dilated_with_bias,
        ring_with_attention_kept,
        ring_with_bias,
        ring_in_chunks,
        ring_zigzag,
        all_to_all,
        all_to_all_run_again,
    )
}
