"""Calls the op as on a GPU, with a driver that launches nothing: the rest is Triton's own.

Arguments are bound and specialised, tile shapes are chosen and kept on disk, and kernels are
compiled for sm_90. The interpreter does none of this. Prints the names of the kernels, one JSON
list.
"""

import json
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from longnet_zoo.ops import fused_softmax
from longnet_zoo.ops.dilated_attention import dilated_attention
from longnet_zoo.ops.kernels import triton as kernel
from longnet_zoo.ops.kernels.triton_tuning import TILES
from longnet_zoo.ops.pattern import DilatedPattern

NESTED = DilatedPattern(segment_lengths=(16, 32), dilation_rates=(1, 2))
DENSE = DilatedPattern(segment_lengths=(64,), dilation_rates=(1,))
UNCOVERED = DilatedPattern(segment_lengths=(16,), dilation_rates=(3,))
# Of those of float32, which the autotuner knows.
SMALL_TILES = [(32, 32, 4, 2), (32, 32, 4, 1)]


class Driver:
    """A GPU of compute capability 9.0 that times everything at a millisecond."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_device_interface(self):
        return torch.cuda

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_benchmarker(self):
        def benchmark(run, quantiles=None):
            run()
            return [1.0, 1.0, 1.0]

        return benchmark


def attend(seq_len=64, num_heads=2, num_kv_heads=2, dtype=torch.bfloat16, pattern=NESTED, **more):
    heads = (num_heads, num_kv_heads, num_kv_heads)
    q, k, v = (torch.randn(1, seq_len, h, 32, dtype=dtype, requires_grad=True) for h in heads)
    out = dilated_attention(q, k, v, pattern, backend="triton", **more)
    out.sum().backward()


def _use_tiles(number):
    """Tries so many tile shapes, small ones, which compile far sooner than those in use."""
    for shapes_by_size in TILES.values():
        for shapes in shapes_by_size.values():
            shapes[:] = SMALL_TILES[:number]


def main():
    compiled = []
    run = JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        compiled.append(self.__name__)
        return run(self, *arguments, grid=grid, warmup=True, **options)

    driver.set_active(Driver())
    slopes = torch.full((2, 1), 0.1, requires_grad=True)
    mask = torch.zeros(1, 64, dtype=torch.bool).index_fill(1, torch.tensor(0), True)
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(kernel, "supports", return_value=None),
        mock.patch.object(fused_softmax, "_BAND_PROGRAMMES", 1),
    ):
        _use_tiles(2)
        attend(pattern=DENSE)
        _use_tiles(1)  # enough for the others
        attend(is_causal=True, num_heads=4, dropout_p=0.3, dtype=torch.float32)
        attend(seq_len=1, num_heads=1, num_kv_heads=1, dtype=torch.float16, pattern=DENSE)
        attend(
            pattern=UNCOVERED,
            bias=lambda distances: -slopes * distances.abs(),
            key_padding_mask=mask,
        )
    print(json.dumps(compiled))


if __name__ == "__main__":
    assert not triton.knobs.runtime.interpret
    main()
