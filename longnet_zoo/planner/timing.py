"""The predicted time of a training step, and which communication computation hides.

Products, attention and passes over memory follow each other; each runs at a share of what the GPU
can do (`hardware`). What travels is hidden as far as there is computation that needs none of it:

- dilated: own keys are attended to meanwhile, in both passes;
- ring: the keys at hand are;
- all_to_all: nothing can be done meanwhile;
- parameters of a block (FSDP2): the block before it is computed.

Latency of messages and kernel launches, waiting for slower ranks and reading data are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from .block import Sizes, block_bytes
from .hardware import Gpu
from .network import Network
from .traffic import Method, Traffic

__all__ = ["REDUCED", "StepTime", "Work", "step_time"]

# Passes over what a block keeps, in one run forward: each tensor is written once and read once.
_PASSES = 2
# Bytes of a gradient when ranks add them up: float32, whatever the precision.
REDUCED = 4


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the busiest rank does in a step.

    Attributes:
        network: The model.
        method: How ranks share the sequence.
        rows: Tokens of the rank.
        linear_flops: FLOPs of all products but those of attention, forward.
        head_flops: Those of them that make the logits.
        pairs: Attended pairs of one layer.
        own_pairs: Those of them that need no other rank.
        runs_again: Whether blocks are computed again in the backward pass.
        attends_again: Whether attention is.
        sends_again: Whether what it needs travels again.
        sizes: Bytes of numbers.
        traffic: Bytes of attention in one layer.
        ranks: Ranks that share the sequence.
        gpus: All ranks.
        fsdp: Whether parameters are sharded over all of them.
    """

    network: Network
    method: Method
    rows: int
    linear_flops: float
    head_flops: float
    pairs: float
    own_pairs: float
    runs_again: bool
    attends_again: bool
    sends_again: bool
    sizes: Sizes
    traffic: Traffic
    ranks: int
    gpus: int
    fsdp: bool

    @property
    def product_flops(self) -> float:
        """FLOPs of a step without attention; logits are always made twice."""
        runs = 4 if self.runs_again else 3
        return runs * (self.linear_flops - self.head_flops) + 4 * self.head_flops

    @property
    def attention_flops(self) -> tuple[float, float]:
        """FLOPs of attention in one layer, (forward, backward)."""
        return self.forward_flops(self.pairs), 10 * self.network.head_dim * self.pairs

    @property
    def attention_runs(self) -> int:
        """How often the forward pass of attention runs in a step."""
        return 2 if self.attends_again else 1

    @property
    def flops(self) -> float:
        """FLOPs of a step."""
        forward, backward = self.attention_flops
        attention = self.attention_runs * forward + backward
        return self.product_flops + self.network.num_layers * attention

    @property
    def parameter_bytes(self) -> int:
        """Bytes sent for parameters and gradients: gathered twice, then averaged.

        The root of the model is not gathered again. Without FSDP an all-reduce sends both halves.
        """
        others = (self.gpus - 1) / self.gpus
        network = self.network
        if not self.fsdp:
            return int(2 * others * network.num_params * REDUCED)
        blocks = network.num_layers * network.block_params
        gathered = self.sizes.parameter * (network.num_params + blocks)
        return int(others * (gathered + REDUCED * network.num_params))

    def forward_flops(self, pairs: float) -> float:
        """FLOPs of attention forward."""
        return 4 * self.network.head_dim * pairs


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step, predicted.

    Attributes:
        compute_s: Computation.
        hidden_s: Communication while something is computed.
        exposed_s: Communication that is waited for.
    """

    compute_s: float
    hidden_s: float
    exposed_s: float

    @property
    def step_s(self) -> float:
        """The whole step."""
        return self.compute_s + self.exposed_s


def step_time(work: Work, gpu: Gpu) -> StepTime:
    """Predicts the time of a step."""
    network, layers = work.network, work.network.num_layers
    forward, backward = (gpu.attend_s(x, work.sizes.compute) for x in work.attention_flops)
    block = block_bytes(network, work.sizes, "cuda")
    products = gpu.multiply_s(work.product_flops, work.sizes.compute)
    # A backward pass reads and writes about twice as much as a forward one.
    runs = 4 if work.runs_again else 3
    copies = gpu.copy_s(runs * _PASSES * layers * work.rows * block.kept)
    attention = layers * (work.attention_runs * forward + backward)
    compute = products + copies + attention

    hidden = exposed = 0.0
    share = 0.0 if work.method == "all_to_all" else work.own_pairs / max(work.pairs, 1)
    if work.method == "ring":
        share = 1.0
    for runs, own_s, traffic in (
        (2 if work.sends_again else 1, share * forward, _busiest(work.traffic, is_backward=False)),
        (1, share * backward, _busiest(work.traffic, is_backward=True)),
    ):
        travel = gpu.send_s(traffic, work.ranks)
        hidden += layers * runs * min(travel, own_s)
        exposed += layers * runs * max(0.0, travel - own_s)
    sharding = gpu.send_s(work.parameter_bytes, work.gpus)
    # Of all blocks but the first one, the parameters come while another block is computed.
    covered = min(sharding, compute) * (layers - 1) / layers if work.fsdp else 0.0
    return StepTime(
        compute_s=compute, hidden_s=hidden + covered, exposed_s=exposed + sharding - covered
    )


def _busiest(traffic: Traffic, *, is_backward: bool) -> int:
    if is_backward:
        return int(max(traffic.backward_sent.max(), traffic.backward_received.max()))
    return int(max(traffic.forward_sent.max(), traffic.forward_received.max()))
