"""Registers, spills and shared memory of the Triton kernels, compiled without a GPU.

A kernel that spills registers, or needs more shared memory than a multiprocessor has, is slow or
does not start. Both are known once it is compiled, and a compiler needs no GPU.

    python -m benchmarks.triton_resources [--capability 80 90 100] [--head-dim 64 128] [--first]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.measure import finish
from longnet_zoo.ops.kernels.triton_backward import key_gradients, query_gradient, row_deltas
from longnet_zoo.ops.kernels.triton_bias import bias_gradient
from longnet_zoo.ops.kernels.triton_forward import attend_rows
from longnet_zoo.ops.kernels.triton_parts import Problem, Rows, make_kinds
from longnet_zoo.ops.kernels.triton_tuning import tiles_for

# Dynamic shared memory of a block, in bytes (CUDA C++ Programming Guide, compute capabilities).
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_ALIGNED = [["tt.divisibility", 16]]
_TUNED = {"forward": attend_rows, "query_gradient": query_gradient, "key_gradients": key_gradients}
_BAND_BLOCK = 32
_DELTA_BLOCK = 64


def main() -> None:
    """Compiles, prints a table and one JSON document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtype", nargs="+", default=["bf16"], choices=list(DTYPES.values()))
    parser.add_argument("--first", action="store_true", help="only the first tile shape of each")
    parser.add_argument("--output", help="JSON file to write")
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("error: TRITON_INTERPRET=1 keeps Triton from compiling. Unset it.")
    dtypes = [dtype for dtype, name in DTYPES.items() if name in options.dtype]
    rows = []
    for capability in options.capability:
        for dtype in dtypes:
            for head_dim in options.head_dim:
                for row in measure(capability, dtype, head_dim, only_first=options.first):
                    rows.append(row)
                    print(
                        "sm_{capability} {dtype} head_dim {head_dim:3} {kernel:14} {tile!s:18} "
                        "{registers:3} registers {spilled:4} B spilled {shared:6} B shared "
                        "{tensor_cores}".format(**row),
                        flush=True,
                    )
    finish({"benchmark": "triton_resources", "rows": rows}, options.output)


def measure(
    capability: int, dtype: torch.dtype, head_dim: int, *, only_first: bool = False
) -> Iterator[dict[str, Any]]:
    """Compiles every kernel: with each tile shape, for branches with partials and the last one."""
    kinds = make_kinds(
        head_dim=head_dim,
        num_others=4,
        attends=True,
        dtype=dtype,
        is_causal=True,
        zero_keys=False,
        has_bias=False,
        has_hidden=False,
        has_dropout=False,
    )
    partial, last = kinds[0], kinds[-1]
    for name, kernel in _TUNED.items():
        tiles = tiles_for(name, head_dim, is_float32=dtype == torch.float32)
        for m, n, warps, stages in tiles[:1] if only_first else tiles:
            blocks = {"BLOCK_M": m, "BLOCK_N": n}
            for kind, suffix in ((partial, ""), (last, " last")):
                row = _resources(kernel, kind, blocks, (warps, stages), capability, dtype)
                label = {"kernel": name + suffix, "tile": (m, n, warps, stages)}
                yield _labelled(capability, dtype, head_dim, label, row)
    biased = last._replace(has_bias=triton.language.constexpr(True))
    for kernel, kind, blocks in (
        (row_deltas, last, {"BLOCK_M": _DELTA_BLOCK, "HAS_LSE_GRAD": False}),
        (bias_gradient, biased, {"BLOCK": _BAND_BLOCK}),
    ):
        row = _resources(kernel, kind, blocks, (4, 3), capability, dtype)
        label = {"kernel": kernel.__name__, "tile": tuple(blocks.values())}
        yield _labelled(capability, dtype, head_dim, label, row)


def _labelled(
    capability: int, dtype: torch.dtype, head_dim: int, *rows: dict[str, Any]
) -> dict[str, Any]:
    labels = {"capability": capability, "dtype": DTYPES[dtype], "head_dim": head_dim}
    return labels | rows[0] | rows[1]


def _resources(
    kernel: Any,
    kind: Any,
    blocks: dict[str, Any],
    launch: tuple[int, int],
    capability: int,
    dtype: torch.dtype,
) -> dict[str, Any]:
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn  # below the autotuner
    compiled = triton.compile(
        _source(kernel, kind, blocks, DTYPES[dtype]),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch[0], "num_stages": launch[1]},
    )
    ptx = compiled.asm["ptx"]
    report = _assembler_report(ptx, capability)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = re.search(r"Used (\d+) registers", report)
    assert spills is not None, report
    assert registers is not None, report
    units = ("wgmma", "tcgen05.mma", "mma.sync")
    return {
        "registers": int(registers[1]),
        "spilled": max(map(int, spills.groups())),
        "shared": compiled.metadata.shared,
        "tensor_cores": next((unit for unit in units if unit in ptx), "none"),
    }


def _source(kernel: Any, kind: Any, blocks: dict[str, Any], dtype: str) -> ASTSource:
    """Types, constants and alignments of the arguments, as a call on a GPU would find them."""
    rows = Rows(f"*{dtype}", "i64", "i32", "i32")
    problem = Problem(
        *("*i64", "*i32", "*i32", "i32", "i32", "constexpr", "fp32"),
        *("*fp32", "i32", "*u8", "fp32", "i64"),
    )
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    aligned: dict[tuple[int, ...], Any] = {}
    for index, name in enumerate(kernel.arg_names):
        if name == "SORT":
            signature[name], constants[index,] = "constexpr", "any"
        elif name in blocks:
            signature[name], constants[index,] = "constexpr", blocks[name]
        elif name == "kind":
            signature[name] = type(kind)(*["constexpr"] * len(kind))
            constants |= {(index, field): value.value for field, value in enumerate(kind)}
        elif name == "problem":
            signature[name], constants[index, Problem._fields.index("group_size")] = problem, 1
        elif name in ("q", "k", "v", "out_grad"):
            signature[name] = rows
            aligned |= {(index, field): _ALIGNED for field in range(len(rows))}
        elif name in _NUMBERS:
            signature[name] = "i32"
        else:
            is_result = name in ("out", "q_grad", "k_grad", "v_grad")
            signature[name], aligned[index,] = f"*{dtype if is_result else 'fp32'}", _ALIGNED
    return ASTSource(kernel, signature, constexprs=constants, attrs=aligned)


_NUMBERS = ("first_head", "num_partials", "branch", "num_sequences", "first_band")


def _assembler_report(ptx: str, capability: int) -> str:
    tool = "ptxas_blackwell" if capability >= 100 else "ptxas"
    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [getattr(triton.knobs.nvidia, tool).path, "-v", f"--gpu-name={target[1]}"]
        command += [str(source), "-o", str(Path(folder, "kernel.cubin"))]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


if __name__ == "__main__":
    main()
