from dataclasses import replace

import pytest

from longnet_zoo.layers import MemorySaving
from longnet_zoo.planner import GPUS, PlanConfig, describe, find_gpu, plan_step
from longnet_zoo.planner.plan import _longest

ROTARY = {"position": "rotary"}
BASE = PlanConfig(model="longnet_lm_base", options=ROTARY, seq_len=2**20, gpus=8)
# LongNet's 1B run (arXiv 2307.02486, Sec. 3.2): segments of 2048, of a device, of everything.
BILLION = PlanConfig(
    model="longnet_lm_base",
    options={
        **ROTARY,
        "segment_lengths": (2048, 3_906_250, 10**9),
        "dilation_rates": (1, 1907, 488_281),
    },
    seq_len=10**9,
    gpus=256,
)


def methods(config, **options):
    return {plan.method: plan for plan in plan_step(config, longest=False, **options).methods}


def test_sharding_divides_parameters_gradients_and_optimizer():
    memory = methods(BASE)["dilated"].memory
    size = 4 * describe("longnet_lm_base", {}).num_params
    assert memory.parameters == memory.gradients == memory.optimizer // 2 == size // 8
    assert memory.gathered > 0
    whole = methods(replace(BASE, fsdp=False, precision="bf16-true"))["dilated"].memory
    assert whole.parameters == whole.gradients == size // 2
    assert whole.gathered == 0
    assert memory.total == size // 2 + memory.gathered + memory.activations


def test_flops_are_those_of_the_model():
    config = replace(BASE, gpus=1, memory_saving=None)
    network = describe("longnet_lm_base", {})
    model, head = network.model, 2 * network.head_rows * network.embed_dim * 2**20
    forward, backward = network.pattern.flops(2**20, 12, 64, is_causal=True)
    linear = model.flops(2**20) - 12 * forward
    # Logits are made twice.
    expected = 3 * linear + head + 12 * (forward + backward)
    found = methods(config)
    assert found["dilated"].flops == expected == found["all_to_all"].flops
    again = methods(replace(config, memory_saving=MemorySaving()))["dilated"].flops
    assert again == expected + linear - head + 12 * forward
    kept = methods(replace(config, memory_saving=MemorySaving(keep_attention=True)))
    assert kept["dilated"].flops == again - 12 * forward


def test_what_attention_returned_does_not_travel_again_if_it_is_kept():
    # Segments cross the borders of the parts.
    config = replace(BASE, seq_len=2**20 + 4 * 999, gpus=4, memory_saving=MemorySaving())
    again = methods(config)
    kept = methods(replace(config, memory_saving=MemorySaving(keep_attention=True)))
    for name in ("dilated", "ring", "all_to_all"):
        before, after = (x[name].time for x in (again, kept))
        if name == "all_to_all":
            assert after.exposed_s == pytest.approx(before.exposed_s, rel=0.1)
        else:
            assert after.hidden_s + after.exposed_s < before.hidden_s + before.exposed_s
        assert kept[name].flops < again[name].flops


def test_ranks_divide_the_work_and_dense_attention_is_more():
    one, eight = methods(replace(BASE, gpus=1)), methods(BASE)
    assert eight["dilated"].flops == pytest.approx(one["dilated"].flops / 8, rel=0.01)
    assert eight["ring"].flops > 10 * eight["dilated"].flops
    assert "another model" in eight["ring"].note
    dense = {**ROTARY, "segment_lengths": (2**30,), "dilation_rates": (1,)}
    dense = replace(BASE, options=dense)
    assert methods(dense)["ring"].note == ""
    # Of a contiguous causal ring the last rank has twice the mean.
    uneven = methods(replace(dense, layout="contiguous"))["ring"].time.compute_s
    assert uneven > 1.5 * methods(dense)["ring"].time.compute_s


def test_data_parallel_groups_share_the_optimizer_only():
    config = replace(BASE, gpus=16, data_parallel_size=2)
    plan, one = methods(config)["dilated"], methods(BASE)["dilated"]
    assert plan.flops == one.flops
    assert plan.forward_bytes == one.forward_bytes
    assert plan.memory.optimizer == one.memory.optimizer // 2


def test_communication_is_hidden_or_waited_for():
    found = methods(replace(BASE, gpus=4))
    for plan in found.values():
        assert plan.time.step_s == plan.time.compute_s + plan.time.exposed_s
    slow = methods(replace(BASE, gpus=4, gpu="cpu", precision="32-true"))
    assert found["all_to_all"].time.exposed_s > 10 * found["dilated"].time.exposed_s > 0
    assert slow["dilated"].time.step_s > 100 * found["dilated"].time.step_s


def test_a_billion_tokens_on_256_gpus():
    plan = plan_step(BILLION)
    found = {method.method: method for method in plan.methods}
    dilated = found["dilated"]
    assert plan.rows_per_rank == 3_906_250
    assert 0 < dilated.forward_bytes < 64 * 2**20
    assert not dilated.fits
    assert 0 < dilated.longest_seq_len < 10**9
    assert methods(replace(BILLION, memory_saving=MemorySaving(offload=True)))["dilated"].fits
    assert found["all_to_all"].memory is None


def test_what_cannot_serve_is_refused():
    found = methods(BILLION)
    assert "256 processes and num_heads=12" in found["all_to_all"].refusal
    xpos = methods(replace(BASE, options={}))
    assert "segment of 1048576 positions" in xpos["ring"].refusal
    assert "Use --option position=rotary, --option xpos_scale_base=84" in xpos["ring"].refusal
    assert xpos["dilated"].refusal == ""  # its segments are shorter
    zero = methods(replace(BASE, options={"padded_keys": "zero"}))
    assert "padded_keys='zero'" in zero["ring"].refusal
    assert zero["dilated"].refusal == ""


def test_a_bias_by_distance_takes_a_table_of_the_longest_segment():
    options = {"position": "alibi", "segment_lengths": (2048, 2**20), "dilation_rates": (1, 512)}
    plain = {**options, "position": None}
    more = [
        methods(replace(BASE, options=options, gpus=gpus))["dilated"].memory.activations
        - methods(replace(BASE, options=plain, gpus=gpus))["dilated"].memory.activations
        for gpus in (1, 8)
    ]
    table = 4 * 12 * (2 * 2**20 - 1)
    # Ranks that share segments need a kernel that makes logits.
    assert more[0] == 2 * table < more[1]


def test_longest_sequence_is_found_to_one_percent():
    for limit in (1, 7, 12_345, 10**9):
        found = _longest(lambda n, limit=limit: n <= limit, 1000)
        assert limit - max(1, limit // 100) <= found <= limit
    asked = []
    assert _longest(lambda n: asked.append(n), 1000) == 0
    assert min(asked) == 1


def test_a_model_that_never_fits_has_no_longest_sequence():
    plan = plan_step(PlanConfig(model="longnet_lm_2b7", seq_len=512, gpu="a100-40gb"))
    assert [method.longest_seq_len for method in plan.methods] == [0, 0, 0]
    assert not any(method.fits for method in plan.methods)


def test_what_waits_in_the_memory_of_the_cpu_is_no_memory_of_the_gpu():
    memory = methods(replace(BASE, memory_saving=MemorySaving(offload=True)))["dilated"].memory
    assert memory.offloaded == 12 * 2**20 // 8 * 768 * 4
    assert memory.total < methods(BASE)["dilated"].memory.total - memory.offloaded // 2
    assert methods(BASE)["dilated"].memory.offloaded == 0


def test_longest_sequence_fits_and_a_longer_one_does_not():
    (longest, *_) = (method.longest_seq_len for method in plan_step(BASE).methods)
    assert methods(replace(BASE, seq_len=longest))["dilated"].fits
    assert not methods(replace(BASE, seq_len=int(1.03 * longest)))["dilated"].fits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 0}, "seq_len must be an integer of at least 1, got 0"),
        ({"gpus": 1.5}, "gpus must be an integer of at least 1, got 1.5"),
        ({"gpus": 2**13}, "gpus must be at most 4,096, got 8,192"),
        ({"seq_len": 10**18}, "seq_len must be at most 9,007,.*got 1,000,000,000,000,000,000"),
        ({"data_parallel_size": 3}, "gpus=8 and data_parallel_size=3"),
        ({"precision": "fp8"}, r"precision must be one of .*got 'fp8'"),
        ({"layout": "spiral"}, "layout must be one of .*'spiral'"),
        ({"gpu": "h20"}, "gpu must be one of h200, .*got 'h20'. Did you mean 'h200'"),
    ],
)
def test_bad_configs_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        replace(BASE, **options)


def test_bad_options_of_the_model_are_refused():
    with pytest.raises(TypeError, match="no option 'heads'"):
        plan_step(replace(BASE, options={"heads": 3}))
    with pytest.raises(ValueError, match="'longnet_lm_bas'"):
        plan_step(replace(BASE, model="longnet_lm_bas"))


@pytest.mark.parametrize("name", GPUS)
def test_gpus_are_plausible(name):
    gpu = find_gpu(name)
    assert gpu.network_gbs <= gpu.node_gbs < gpu.memory_gbs
    assert gpu.multiply_s(1e12, 2) <= gpu.multiply_s(1e12, 4)
    assert gpu.usable_bytes < gpu.memory_gib * 2**30


def test_links_between_nodes_are_slower():
    gpu = find_gpu("h200")
    assert gpu.send_s(1e9, 9) == 9 * gpu.send_s(1e9, 8)
    assert gpu.multiply_s(791.2e12, 2) == pytest.approx(1.0)  # measured: 790 TFLOP/s
    assert gpu.copy_s(4.32e12) == pytest.approx(1.0)  # measured: 4.3 TB/s


def test_a_model_of_several_stacks_is_refused():
    with pytest.raises(ValueError, match=r"one stack of blocks, got 'longnet_clip_tiny'.* visual,"):
        describe("longnet_clip_tiny", {})


def test_branches_beside_the_pattern_are_refused():
    options = {**ROTARY, "extra_branches": ({"kind": "hash_buckets", "num_buckets": 8},)}
    with pytest.raises(NotImplementedError, match=r"got a model with .*HashBuckets\(num_buckets=8"):
        describe("longnet_lm_base", options)
