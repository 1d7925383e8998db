from functools import partial

import pytest
import torch

from benchmarks.measure import peak_extra_mib
from benchmarks.memory import training_step_peak_mib
from longnet_zoo.factory import create_model
from longnet_zoo.layers import MemorySaving
from longnet_zoo.planner import PRECISIONS, Part, activation_memory, describe
from longnet_zoo.planner.logits import Call
from tests.parallel.torchrun import check_case

WHOLE, CHUNKS = MemorySaving(chunk_size=None), MemorySaving(chunk_size=512)
KEPT = MemorySaving(chunk_size=512, keep_attention=True)
NESTED = {"segment_lengths": (256, 512, 1024), "dilation_rates": (1, 2, 4)}
SHORT = {"segment_lengths": (128, 256), "dilation_rates": (1, 2)}
RUNS = [
    ("longnet_lm_tiny", {}, 2048, None, "32-true"),
    ("longnet_lm_tiny", {}, 4001, WHOLE, "32-true"),
    ("longnet_lm_tiny", {}, 4001, CHUNKS, "32-true"),
    ("longnet_lm_tiny", NESTED, 4001, CHUNKS, "32-true"),
    ("longnet_lm_tiny", NESTED, 2003, KEPT, "bf16-mixed"),
    ("longnet_lm_tiny", {}, 1009, None, "bf16-mixed"),
    ("longnet_lm_tiny", {"vocab_size": 9000}, 509, WHOLE, "bf16-mixed"),
    ("longnet_lm_tiny", {"norm": "deepnorm", "num_kv_heads": 1}, 1009, None, "bf16-true"),
    ("longnet_lm_tiny", {"norm": "deepnorm", "num_kv_heads": 1}, 2003, KEPT, "32-true"),
    ("longnet_lm_tiny", {"dropout": 0.1, "activation_dropout": 0.1}, 2003, None, "32-true"),
    (
        "longnet_mlm_tiny",
        {"norm": "pre_ln", "activation": "swiglu", "qk_norm": True},
        1009,
        WHOLE,
        "bf16-true",
    ),
    ("longnet_lm_base", {"num_layers": 1}, 515, WHOLE, "32-true"),
    # Few rows against the width: gradients of matrices, added up over chunks and over spans.
    ("longnet_lm_base", {}, 600, CHUNKS, "32-true"),
    ("longnet_lm_base", {}, 1100, CHUNKS, "32-true"),
    ("longnet_lm_base", {"activation": "swiglu"}, 600, CHUNKS, "32-true"),
    ("longnet_lm_base", SHORT, 1100, MemorySaving(chunk_size=256), "32-true"),
    # Logits of a bias.
    ("longnet_lm_tiny", {"position": "alibi"}, 2003, None, "32-true"),
    ("longnet_lm_tiny", {"position": "relative"}, 2003, CHUNKS, "bf16-true"),
    ("longnet_mlm_tiny", {"position": "alibi", **NESTED}, 2003, WHOLE, "32-true"),
]
CASES = [
    "dilated",
    "dilated_with_shared_keys_in_chunks",
    "dilated_run_again_in_half",
    "dilated_with_attention_kept",
    "dilated_with_bias",
    "ring_with_attention_kept",
    "ring_with_bias",
    "ring_in_chunks",
    "ring_zigzag",
    "all_to_all",
    "all_to_all_run_again",
]


def make(name, options, saving, precision):
    model = create_model(name, **options)
    model.set_memory_saving(saving)
    return model.bfloat16() if precision == "bf16-true" else model


def planned(name, options, seq_len, saving, precision, **part):
    sizes = PRECISIONS[precision]
    part = Part(rows=seq_len, sizes=sizes, saving=saving, **{"device": "cpu", **part})
    return activation_memory(describe(name, options), part)


@pytest.mark.parametrize(("name", "options", "seq_len", "saving", "precision"), RUNS)
def test_planned_peak_is_that_of_a_real_step(name, options, seq_len, saving, precision):
    options = {"vocab_size": 100, "num_layers": 2, **options}
    make_model = partial(make, name, options, saving, precision)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        measured = training_step_peak_mib(make_model, seq_len, is_real=True)
    ratio = planned(name, options, seq_len, saving, precision).peak / 2**20 / measured
    assert 0.85 < ratio < 1.15, f"planned / measured = {ratio:.3f}, measured {measured:.1f} MiB"


@pytest.mark.parametrize("saving", [None, WHOLE, CHUNKS])
def test_planned_peak_is_that_of_a_slide_encoder(saving):
    options = {"num_layers": 2, "input_dim": 64, "embed_dim": 192, "num_heads": 4}
    model = make("gigapath_slide_enc12l768d", options, saving, "32-true")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    cells = torch.cartesian_prod(torch.arange(50.0), torch.arange(50.0))
    tiles, coords = torch.randn(1, 2500, 64), 256 * cells[None]

    def step():
        model(tiles, coords).sum().backward()

    step()
    measured = peak_extra_mib(step)
    plan = planned("gigapath_slide_enc12l768d", options, 2501, saving, "32-true")
    assert 0.85 < plan.peak / 2**20 / measured < 1.15


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_planned_peak_is_that_of_two_ranks(tmp_path_factory, case):
    check_case(tmp_path_factory, "tests.planner.memory_cases", 2, case)


def test_each_saving_saves():
    plan = partial(planned, "longnet_lm_base", {}, 2**16, precision="bf16-mixed", device="cuda")
    plain, whole, chunks, kept, offloaded = (
        plan(saving=saving)
        for saving in (None, WHOLE, CHUNKS, KEPT, MemorySaving(chunk_size=512, offload=True))
    )
    assert plain.peak > whole.peak > chunks.peak > offloaded.peak
    assert kept.peak > chunks.peak
    assert chunks.kept - offloaded.kept == offloaded.offloaded == 2**16 * 12 * 768 * 4
    assert chunks.offloaded == 0


def test_a_sequence_that_ranks_share_is_attended_to_as_a_whole():
    plan = partial(planned, "longnet_lm_tiny", NESTED, 2**16, CHUNKS, "32-true")
    assert plan(is_split=True).peak > 1.5 * plan().peak
    received = plan(is_split=True, gathered=1000, exchanged=10_000).peak
    assert received == plan(is_split=True).peak + 11_000
    assert plan(whole_rows=2**17).peak == plan().peak + 2 * 2**17 * 192 * 4


def test_a_bias_makes_no_logits_in_triton():
    plan = partial(planned, "longnet_lm_tiny", {"position": "alibi"}, 4001, CHUNKS, "bf16-mixed")
    assert plan(device="cpu").peak > 1.5 * plan(device="cuda").peak
    block = Call(batch=1, rows=2000, keys=2000, heads=4, is_causal=False)
    assert plan(device="cuda", calls=(block,)).peak > 1.5 * plan(device="cuda").peak
