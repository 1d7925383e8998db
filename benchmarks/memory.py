"""Memory of a training step by the mode of saving it, at any length, counted without computing.

What counts is the most that is held at once beyond parameters, their gradients and the input. Every
tensor is a fake one, which has a size and no content, so a step of 100 GiB is counted on a laptop;
the inside of the attention op is counted as well. `--check` compares with real steps at a length
that fits. There a small vocabulary is to be taken: fake gradients of a tied embedding are not added
in place, so the largest parameter would count once more than it really does.

    python -m benchmarks.memory --seq-len 32768 --output benchmarks/results/memory.json
    python -m benchmarks.memory --seq-len 2048 --vocab-size 1000 --check
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.measure import Parser, at_least_1, check_output, finish, peak_extra_mib
from benchmarks.record import run_programme
from longnet_zoo.factory import create_model
from longnet_zoo.layers import MemorySaving
from longnet_zoo.models.text import TextModel
from longnet_zoo.ops.custom_op import attend, differentiate
from longnet_zoo.registry import find_model

__all__ = ["MODES", "training_step_peak_mib"]

MODES: dict[str, MemorySaving | None] = {
    "plain": None,
    "whole blocks": MemorySaving(chunk_size=None),
    "chunks": MemorySaving(),
    "chunks, attention kept": MemorySaving(keep_attention=True),
}
_ATTENTION = torch.ops.longnet_zoo


def main(options: argparse.Namespace) -> int:
    """Counts, checks if asked, prints a table and one JSON document."""
    modality = find_model(options.model).modality
    if modality != "text":
        raise ValueError(f"--model must be a text model, got {options.model!r} of {modality}.")
    if options.output is not None:
        check_output(options.output)
    rows: list[dict[str, Any]] = []
    for factor in options.ffn_factor:
        counts = {
            mode: training_step_peak_mib(
                partial(make_model, options, factor, mode), options.seq_len
            )
            for mode in MODES
        }
        for mode, peak_mib in counts.items():
            row = {"mode": mode, "ffn_factor": factor, "peak_mib": peak_mib}
            rows.append({**row, "of_plain": peak_mib / counts["plain"]})
            if options.check:
                make = partial(make_model, options, factor, mode)
                rows[-1]["real_mib"] = training_step_peak_mib(make, options.seq_len, is_real=True)
            print(line_of(rows[-1]), flush=True)
    finish({"benchmark": "memory", **vars(options), "rows": rows}, options.output)
    return 0


def make_model(options: argparse.Namespace, ffn_factor: int, mode: str) -> TextModel:
    """Makes the model that the options name, in one mode."""
    given = {"num_layers": options.num_layers}
    if options.vocab_size is not None:
        given["vocab_size"] = options.vocab_size
    ffn_dim = ffn_factor * find_model(options.model).config.embed_dim
    model = create_model(options.model, ffn_dim=ffn_dim, **given)
    model.set_memory_saving(MODES[mode])
    return model


def line_of(row: dict[str, Any]) -> str:
    """A row of the table."""
    line = (
        f"{row['mode']:24} ffn {row['ffn_factor']} x {row['peak_mib']:9.0f} MiB, "
        f"{row['of_plain']:.3f} of plain"
    )
    if "real_mib" in row:
        line += f", real {row['real_mib']:.0f} MiB: {row['peak_mib'] / row['real_mib']:.3f}"
    return line


def training_step_peak_mib(
    make_model: Callable[[], TextModel], seq_len: int, *, is_real: bool = False
) -> float:
    """Peak memory of loss and backward pass beyond parameters, gradients and input, in MiB.

    Args:
        make_model: Makes the model.
        seq_len: Tokens of the one sequence.
        is_real: Whether to run the step and count what is allocated, rather than fake tensors. The
            count leaves out buffers inside of kernels and the chunk of logits of the loss.
    """
    if is_real:
        step = _make_step(make_model, seq_len)
        step()  # What is made once is made now.
        return peak_extra_mib(step)
    with FakeTensorMode():
        step = _make_step(make_model, seq_len)
        with _Counter() as counter:
            step()
    return counter.peak / 2**20


def _make_step(make_model: Callable[[], TextModel], seq_len: int) -> Callable[[], None]:
    model = make_model().train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tokens = torch.randint(model.config.vocab_size or 1, (1, seq_len + 1))
    inputs, labels = tokens[:, :-1].clone(), tokens[:, 1:].clone()
    return lambda: model.loss(inputs, labels).backward()


class _Counter(TorchDispatchMode):
    """Counts the bytes of all storages that are made while it is on, and the most at once.

    Attributes:
        peak: Most bytes held at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self._insides = {
            _ATTENTION.dilated_attention.default: attend,
            _ATTENTION.dilated_attention_backward.default: differentiate,
        }

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = {x.untyped_storage() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        if func in self._insides:
            with self:
                return self._insides[func](*args, **kwargs)
        out = func(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage() not in given:
                self._add(x.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        num_bytes = storage.nbytes()
        self.held += num_bytes
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._drop, num_bytes)

    def _drop(self, num_bytes: int) -> None:
        self.held -= num_bytes


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = Parser(__doc__)
    parser.add_argument("--model", default="longnet_lm_base", help="a text model of the registry")
    parser.add_argument("--seq-len", type=at_least_1, default=32768, help="tokens")
    parser.add_argument("--num-layers", type=at_least_1, default=12)
    parser.add_argument(
        "--ffn-factor", type=at_least_1, nargs="+", default=[4, 8], help="of embed_dim"
    )
    parser.add_argument("--vocab-size", type=at_least_1, help="default: that of the model")
    parser.add_argument("--check", action="store_true", help="compare with real steps")
    parser.add_argument("--output", type=Path, help="JSON file, overwritten")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_programme(main, read_options())
