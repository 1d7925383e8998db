"""What GPUs can do, from their makers' data sheets, and how much of that a training step gets.

Sources: NVIDIA's data sheets "H200 Tensor Core GPU", "H100 Tensor Core GPU" (SXM), "A100 80GB"
(SXM; 40 GB: "A100") and "DGX B200". TFLOP/s are those of dense bf16 products. NVLink bandwidth is
that of one direction, half of what is advertised. Between nodes a GPU has one adapter in NVIDIA's
DGX systems: 200 Gbit/s (DGX A100), 400 Gbit/s (DGX H100, H200, B200). Memory is what CUDA reports,
rounded down. The CPU is a guess for a machine with 16 GiB, to try the commands on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from longnet_zoo.registry import nearest_names

__all__ = ["GPUS", "Gpu", "find_gpu"]

# Of the TFLOP/s of the data sheet: one H200 was measured to multiply large bf16 matrices at 790.
MATMUL_SHARE = 0.8
# FlashAttention-2 on an H100 (arXiv 2407.08608, abstract).
ATTENTION_SHARE = 0.35
# Of the memory bandwidth: one H200 was measured to copy at 4.3 of 4.8 TB/s.
COPY_SHARE = 0.9
# Of the bandwidth of a link; an assumption.
LINK_SHARE = 0.8
# Of the memory: the rest is for the CUDA context, NCCL and fragments; an assumption.
MEMORY_SHARE = 0.92


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU, per device.

    Attributes:
        memory_gib: Memory in GiB.
        bf16_tflops: Dense bf16 products, 10^12 FLOPs a second.
        float32_tflops: Float32 products, TensorFloat-32 not allowed (PyTorch's default).
        memory_gbs: Bandwidth of the memory, 10^9 bytes a second.
        node_gbs: Bandwidth to GPUs of the node, one direction.
        network_gbs: Bandwidth to other nodes, one direction.
        gpus_per_node: GPUs of a node.
    """

    memory_gib: float
    bf16_tflops: float
    float32_tflops: float
    memory_gbs: float
    node_gbs: float
    network_gbs: float
    gpus_per_node: int = 8

    @property
    def usable_bytes(self) -> int:
        """Memory for tensors."""
        return int(MEMORY_SHARE * self.memory_gib * 2**30)

    def multiply_s(self, flops: float, item_size: int) -> float:
        """Seconds for products of large matrices."""
        return flops / (MATMUL_SHARE * self._flops(item_size))

    def attend_s(self, flops: float, item_size: int) -> float:
        """Seconds for attention."""
        return flops / (ATTENTION_SHARE * self._flops(item_size))

    def copy_s(self, num_bytes: float) -> float:
        """Seconds to read or write memory."""
        return num_bytes / (COPY_SHARE * 1e9 * self.memory_gbs)

    def send_s(self, num_bytes: float, num_gpus: int) -> float:
        """Seconds to send to others of a group of GPUs, by the slowest link among them."""
        link = self.node_gbs if num_gpus <= self.gpus_per_node else self.network_gbs
        return num_bytes / (LINK_SHARE * 1e9 * link)

    def _flops(self, item_size: int) -> float:
        return 1e12 * (self.float32_tflops if item_size == 4 else self.bf16_tflops)


_H100 = Gpu(
    memory_gib=79,
    bf16_tflops=989,
    float32_tflops=67,
    memory_gbs=3350,
    node_gbs=450,
    network_gbs=50,
)
_A100 = Gpu(
    memory_gib=79,
    bf16_tflops=312,
    float32_tflops=19.5,
    memory_gbs=2039,
    node_gbs=300,
    network_gbs=25,
)

GPUS = {
    "h200": replace(_H100, memory_gib=139, memory_gbs=4800),
    "h100": _H100,
    "a100-80gb": _A100,
    "a100-40gb": replace(_A100, memory_gib=39, memory_gbs=1555),
    "b200": Gpu(
        memory_gib=178,
        bf16_tflops=2250,
        float32_tflops=75,
        memory_gbs=8000,
        node_gbs=900,
        network_gbs=50,
    ),
    "cpu": Gpu(
        memory_gib=16,
        bf16_tflops=0.1,
        float32_tflops=0.1,
        memory_gbs=20,
        node_gbs=10,
        network_gbs=1,
        gpus_per_node=1,
    ),
}


def find_gpu(name: str) -> Gpu:
    """Looks a kind of GPU up.

    Raises:
        ValueError: If it is unknown.
    """
    if name not in GPUS:
        near = nearest_names(name, GPUS)
        cure = f" Did you mean {near}?" if near else ""
        raise ValueError(f"gpu must be one of {', '.join(GPUS)}, got {name!r}.{cure}")
    return GPUS[name]
