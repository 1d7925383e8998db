"""The cost of one training step by method: memory of a rank, bytes sent, FLOPs, predicted time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

import torch

from longnet_zoo.layers import MemorySaving
from longnet_zoo.ops.pattern import DilatedPattern
from longnet_zoo.ops.positions import check_xpos_range
from longnet_zoo.parallel.all_to_all import check_num_heads
from longnet_zoo.parallel.layout import Layout, check_layout, part_length

from .block import PRECISIONS
from .hardware import Gpu, find_gpu
from .logits import Call, block_calls, part_calls, whole_calls
from .memory import Part, activation_memory
from .network import Network, dense_pattern, describe
from .timing import REDUCED, StepTime, Work, step_time
from .traffic import METHODS, Method, Traffic, layer_traffic
from .work import pairs_of_heads, pairs_of_parts

__all__ = ["MethodPlan", "Plan", "PlanConfig", "RankMemory", "plan_step"]

Precision = Literal["32-true", "bf16-mixed", "bf16-true"]
_ADAMW_STATES = 2
# More ranks would take minutes to plan; float64 counts no more tokens than that exactly.
MAX_GPUS = 2**12
MAX_SEQ_LEN = 2**53


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What is to be planned: one optimizer step, of one sequence for each group of ranks.

    Attributes:
        model: A registered name.
        options: Options of the model.
        seq_len: Tokens of a sequence.
        gpus: Processes, each with one GPU.
        gpu: The kind of GPU, a name of `GPUS`.
        data_parallel_size: Groups of ranks, each with a sequence of its own.
        precision: "32-true", "bf16-true", or "bf16-mixed": parameters in float32, products in
            bfloat16 by autocast.
        fsdp: Whether parameters, gradients and optimizer are sharded over all ranks (FSDP2).
        memory_saving: How training saves memory; None: not at all.
        layout: Which rank holds which tokens in ring attention.

    Raises:
        ValueError: If a value is outside its range, or two do not fit.
        TypeError: If a value is of the wrong type.
    """

    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    seq_len: int
    gpus: int = 1
    gpu: str = "h200"
    data_parallel_size: int = 1
    precision: Precision = "bf16-mixed"
    fsdp: bool = True
    memory_saving: MemorySaving | None = field(default_factory=MemorySaving)
    layout: Layout = "zigzag"

    def __post_init__(self) -> None:
        for name in ("seq_len", "gpus", "data_parallel_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
        for name, limit in (("seq_len", MAX_SEQ_LEN), ("gpus", MAX_GPUS)):
            if getattr(self, name) > limit:
                raise ValueError(
                    f"{name} must be at most {limit:,}, got {getattr(self, name):,}. "
                    "Plans do not go beyond."
                )
        if self.gpus % self.data_parallel_size:
            raise ValueError(
                "gpus must be a multiple of data_parallel_size, got "
                f"gpus={self.gpus} and data_parallel_size={self.data_parallel_size}."
            )
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision must be one of {get_args(Precision)}, got {self.precision!r}."
            )
        check_layout(self.layout)
        find_gpu(self.gpu)

    @property
    def sequence_parallel_size(self) -> int:
        """Ranks that share a sequence."""
        return self.gpus // self.data_parallel_size


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of one rank at the worst moment.

    Attributes:
        parameters: What the rank holds of the parameters.
        gradients: Of their gradients.
        optimizer: Of AdamW's two states.
        gathered: Parameters and gradients of the blocks at work, whole (FSDP2).
        activations: Everything that depends on the length, keys of other ranks included.
        offloaded: What waits in the memory of the CPU, for each rank; not in `total`.
    """

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    offloaded: int

    @property
    def total(self) -> int:
        """The sum of what is on the GPU."""
        return sum(getattr(self, x.name) for x in fields(self)) - self.offloaded


@dataclass(frozen=True, kw_only=True)
class MethodPlan:
    """One method of sharing a sequence.

    Attributes:
        method: Its name.
        refusal: Why it cannot serve; the rest is None then.
        note: What to know before comparing it.
        memory: Memory of the fullest rank.
        fits: Whether that is in the GPU.
        forward_bytes: Bytes that the busiest rank sends in one layer, forward.
        backward_bytes: The same in the backward pass.
        parameter_bytes: Bytes that a rank sends for parameters and their gradients, per step.
        flops: FLOPs of a step on the busiest rank, recomputation included.
        time: The predicted step.
        longest_seq_len: Longest sequence that fits, to about 1 %; 0 if none does.
    """

    method: Method
    refusal: str = ""
    note: str = ""
    memory: RankMemory | None = None
    fits: bool | None = None
    forward_bytes: int | None = None
    backward_bytes: int | None = None
    parameter_bytes: int | None = None
    flops: int | None = None
    time: StepTime | None = None
    longest_seq_len: int | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A plan, method by method.

    Attributes:
        config: What was planned.
        num_params: Parameters of the model.
        rows_per_rank: Tokens of a rank.
        usable_bytes: Memory of a GPU for tensors.
        methods: The plan of each method.
    """

    config: PlanConfig
    num_params: int
    rows_per_rank: int
    usable_bytes: int
    methods: tuple[MethodPlan, ...]


def plan_step(config: PlanConfig, *, longest: bool = True) -> Plan:
    """Plans a training step for each method.

    Args:
        config: What to plan.
        longest: Whether to look for the longest sequence that fits as well.

    Raises:
        ValueError: If the model is unknown or an option has a bad value.
        TypeError: If an option is unknown or of the wrong type.
    """
    planner = _Planner(config, describe(config.model, config.options))
    return Plan(
        config=config,
        num_params=planner.network.num_params,
        rows_per_rank=part_length(config.seq_len, config.sequence_parallel_size),
        usable_bytes=find_gpu(config.gpu).usable_bytes,
        methods=tuple(planner.plan(method, longest=longest) for method in METHODS),
    )


class _Planner:
    """One config and its model."""

    def __init__(self, config: PlanConfig, network: Network) -> None:
        self.config, self.network = config, network
        self.gpu: Gpu = find_gpu(config.gpu)
        self.ranks = config.sequence_parallel_size
        self.sizes = PRECISIONS[config.precision]

    def plan(self, method: Method, *, longest: bool) -> MethodPlan:
        """Plans one method."""
        refusal = self._refusal(method, self.config.seq_len)
        if refusal:
            return MethodPlan(method=method, refusal=refusal)
        seq_len = self.config.seq_len
        traffic = self._traffic(method, seq_len)
        memory = self._memory(method, seq_len, traffic)
        work = self._work(method, seq_len, traffic)
        return MethodPlan(
            method=method,
            note=self._note(method),
            memory=memory,
            fits=memory.total <= self.gpu.usable_bytes,
            forward_bytes=int(traffic.forward_sent.max()),
            backward_bytes=int(traffic.backward_sent.max()),
            parameter_bytes=work.parameter_bytes,
            flops=int(work.flops),
            time=step_time(work, self.gpu),
            longest_seq_len=_longest(lambda n: self._fits(method, n), seq_len) if longest else None,
        )

    def _refusal(self, method: Method, seq_len: int) -> str:
        network = self.network
        if method == "all_to_all":
            try:
                check_num_heads(network.num_heads, self.ranks)
            except ValueError as error:
                return str(error)
        if method == "ring" and network.pattern.padded_keys == "zero":
            return "padded_keys='zero' is of dilated attention only"
        if network.xpos_scale_base is not None:
            longest = seq_len if method == "ring" else network.pattern.segment_lengths[-1]
            try:
                check_xpos_range(
                    span=min(seq_len, longest),
                    head_dim=network.head_dim,
                    scale_base=network.xpos_scale_base,
                    is_causal=network.is_causal,
                    dtype=torch.float32 if self.sizes.compute == 4 else torch.bfloat16,
                )
            except ValueError as error:
                # What the model calls scale_base is an option of another name here.
                cure = "Use --option position=rotary, --option xpos_scale_base="
                return str(error).replace("Use scale_base=", cure)
        return ""

    def _note(self, method: Method) -> str:
        if method == "ring" and not self.network.pattern.is_dense:
            return "dense attention, another model than the dilated one"
        return ""

    def _pattern(self, method: Method, seq_len: int) -> DilatedPattern:
        return dense_pattern(seq_len) if method == "ring" else self.network.pattern

    def _traffic(self, method: Method, seq_len: int) -> Traffic:
        network = self.network
        return layer_traffic(
            method,
            pattern=network.pattern,
            seq_len=seq_len,
            num_ranks=self.ranks,
            num_heads=network.num_heads,
            num_kv_heads=network.num_kv_heads,
            head_dim=network.head_dim,
            is_causal=network.is_causal,
            item_size=self.sizes.compute,
            layout=self.config.layout,
        )

    def _fits(self, method: Method, seq_len: int) -> bool:
        if self._refusal(method, seq_len):
            return False
        memory = self._memory(method, seq_len, self._traffic(method, seq_len))
        return memory.total <= self.gpu.usable_bytes

    def _memory(self, method: Method, seq_len: int, traffic: Traffic) -> RankMemory:
        network, config = self.network, self.config
        # A bias by distance is a table of all distances in a segment; its gradient is another.
        span = min(seq_len, self._pattern(method, seq_len).segment_lengths[-1])
        table = 4 * network.num_heads * (2 * span - 1) if network.has_bias else 0
        rows = part_length(seq_len, self.ranks)
        tile = rows // 2 if config.layout == "zigzag" and self.ranks > 1 else rows
        part = Part(
            rows=rows,
            whole_rows=0 if network.is_text or self.ranks == 1 else seq_len,
            sizes=self.sizes,
            saving=config.memory_saving,
            is_split=self.ranks > 1 or method == "ring",
            gathered=int(traffic.kept.max()) + table,
            kept_with_op=int(traffic.kept.max()) if method == "dilated" else 0,
            exchanged=int(traffic.meanwhile.max()) + table,
            call_rows=tile if method == "ring" else None,
            calls=self._calls(method, seq_len, tile),
            device="cpu" if config.gpu == "cpu" else "cuda",
        )
        shards = config.gpus if config.fsdp else 1
        shard = -(-network.num_params // shards) * self.sizes.parameter
        # The root and two blocks, the second fetched ahead; gradients of one, and as they are sent.
        gathered = self.sizes.parameter * (network.root_params + 3 * network.block_params)
        gathered += REDUCED * network.block_params
        activations = activation_memory(network, part)
        return RankMemory(
            parameters=shard,
            gradients=shard,
            optimizer=_ADAMW_STATES * shard,
            gathered=gathered if config.fsdp else 0,
            activations=activations.peak,
            offloaded=activations.offloaded,
        )

    def _calls(self, method: Method, seq_len: int, tile: int) -> tuple[Call, ...] | None:
        """Kernel calls that make logits of a bias, if it is not the whole sequence on one rank."""
        network = self.network
        if method == "ring":
            return tuple(block_calls(network, tile))
        if self.ranks == 1 or not network.has_bias:
            return None
        if method == "dilated":
            return tuple(part_calls(network, seq_len, self.ranks))
        if self.config.gpu != "cpu":
            return ()
        return tuple(whole_calls(network, seq_len, num_heads=network.num_heads // self.ranks))

    def _work(self, method: Method, seq_len: int, traffic: Traffic) -> Work:
        network, saving = self.network, self.config.memory_saving
        pairs, own_pairs = self._pairs(method, seq_len)
        runs_again = saving is not None
        attends_again = saving is not None and not saving.keep_attention
        return Work(
            network=network,
            method=method,
            rows=part_length(seq_len, self.ranks),
            linear_flops=network.linear_flops(seq_len) / self.ranks,
            head_flops=2 * network.head_rows * network.embed_dim * seq_len / self.ranks,
            pairs=pairs,
            own_pairs=own_pairs,
            runs_again=runs_again,
            attends_again=attends_again,
            # Heads and tokens are exchanged outside of what is kept.
            sends_again=runs_again if method == "all_to_all" else attends_again,
            sizes=self.sizes,
            traffic=traffic,
            ranks=self.ranks,
            gpus=self.config.gpus,
            fsdp=self.config.fsdp,
        )

    def _pairs(self, method: Method, seq_len: int) -> tuple[float, float]:
        """Pairs of the busiest rank in one layer, and those of them with keys of its own."""
        network = self.network
        pattern = self._pattern(method, seq_len)
        options = {"seq_len": seq_len, "num_parts": self.ranks, "num_heads": network.num_heads}
        if method == "all_to_all":
            pairs = pairs_of_heads(pattern, **options, is_causal=network.is_causal)
            return float(pairs.max()), float(pairs.max())
        pairs, own_pairs = pairs_of_parts(pattern, **options, is_causal=network.is_causal)
        if method == "ring" and self.config.layout != "contiguous":
            return float(pairs.mean()), float(own_pairs.mean())
        return float(pairs.max()), float(own_pairs[pairs.argmax()])


def _longest(fits: Callable[[int], bool], start: int) -> int:
    """Searches the longest sequence that fits, to about 1 %."""
    low, high = start, start
    if fits(start):
        while fits(high := 2 * high):
            low = high
    else:
        while (low := low // 2) and not fits(low):
            high = low
    while low and high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
