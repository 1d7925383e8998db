"""Less memory in training: what a block computes again in the backward pass, and in which pieces.

Of each block only its input is kept. The backward pass computes attention again, once, and then the
feed-forward network for some tokens at a time, so that its hidden channels exist for these alone:
the blockwise parallel Transformer (arXiv 2305.19370).

Shape legend: b batch, n seq_len, e embed_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import (
    checkpoint,
    create_selective_checkpoint_contexts,
)

from .multiway import Route
from .spans import split_route

__all__ = [
    "MemorySaving",
    "SecondRun",
    "check_not_compiled",
    "run_again_in_backward",
    "run_in_chunks",
]


@dataclass(frozen=True, kw_only=True)
class MemorySaving:
    """How a block saves memory in training; results and gradients stay what they are.

    A block keeps its input alone and computes the rest again in the backward pass.

    Attributes:
        chunk_size: Tokens, of all sequences of a batch together, whose hidden feed-forward channels
            exist at once. Attention, too, then takes about as many tokens at a time where it can:
            whole segments of the longest branch, if all other segments nest in these. None: all
            tokens at once.
        keep_attention: Whether to keep what the attention op returns as well, one more tensor of
            the size of the input, and not to run the op again.
        offload: Whether what is kept waits for the backward pass in the memory of the CPU.

    Raises:
        ValueError: If `chunk_size` is below 1.
        TypeError: If an option is of the wrong kind.
    """

    chunk_size: int | None = 4096
    keep_attention: bool = False
    offload: bool = False

    def __post_init__(self) -> None:
        if self.chunk_size is not None:
            if type(self.chunk_size) is not int:
                raise TypeError(f"chunk_size must be an integer or None, got {self.chunk_size!r}.")
            if self.chunk_size < 1:
                raise ValueError(
                    f"chunk_size must be at least 1 token, got {self.chunk_size}. None takes all "
                    "tokens at once."
                )
        for name in ("keep_attention", "offload"):
            if type(getattr(self, name)) is not bool:
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}.")


class SecondRun:
    """Context of a second run, the one in the backward pass, which can ask whether it is on.

    Args:
        inner: A context to enter as well.

    Attributes:
        is_on: Whether the second run goes on.
    """

    def __init__(self, inner: AbstractContextManager[object] | None = None) -> None:
        self.is_on = False
        self.inner = nullcontext() if inner is None else inner

    def __enter__(self) -> None:
        self.is_on = True
        self.inner.__enter__()

    def __exit__(self, *error: object) -> None:
        self.is_on = False
        self.inner.__exit__(*error)  # type: ignore[arg-type]


def check_not_compiled(saving: MemorySaving) -> None:
    """Refuses what compiled code would not do.

    Raises:
        NotImplementedError: If `chunk_size` or `offload` is set.
    """
    # A compiler orders the second runs by itself: it would hold the channels of many chunks.
    if saving.chunk_size is not None or saving.offload:
        raise NotImplementedError(
            "chunk_size and offload save memory outside of compiled code only, got "
            f"chunk_size={saving.chunk_size} and offload={saving.offload} under torch.compile. "
            "Compile parts, block.attention.compile() and block.feed_forward.compile() for each "
            "of model.stack.blocks; or use MemorySaving(chunk_size=None)."
        )


def run_again_in_backward(
    run: Callable[[Tensor, SecondRun], Tensor], x: Tensor, saving: MemorySaving
) -> Tensor:
    """Runs a function, keeps its input alone, and runs it again in the backward pass.

    Args:
        run: The function. In the second run only tensors that its graph saves are made again; the
            result is not used.
        x: Its input.
        saving: What else is kept, and where.

    Returns:
        What the function returns.
    """
    keep = partial(create_selective_checkpoint_contexts, _attention_ops())
    if torch.compiler.is_compiling():
        # The compiler takes no other contexts than its own, nor a default one.
        if saving.keep_attention:
            return checkpoint(run, x, SecondRun(), use_reentrant=False, context_fn=keep)
        return checkpoint(run, x, SecondRun(), use_reentrant=False)
    first: AbstractContextManager[object] = nullcontext()
    second_run = SecondRun()
    if saving.keep_attention:
        keeping, second_run.inner = keep()
        first = _offloadable(keeping)
    with _offloading(saving, x), _same_casts(saving):
        return checkpoint(
            run, x, second_run, use_reentrant=False, context_fn=lambda: (first, second_run)
        )


def run_in_chunks(
    run: Callable[..., Tensor],
    x: Tensor,
    route: Route | None,
    *,
    chunk_size: int,
    second_run: SecondRun,
) -> Tensor:
    """Runs a function of single tokens for some of them at a time, and so in the backward pass.

    For use inside of what `run_again_in_backward` runs. In the second run of that only the inputs
    of the chunks are wanted: each chunk is computed again when the backward pass comes to it, and
    would be computed twice otherwise.

    Args:
        run: The function, of tokens (b, m, e) and their `route`.
        x: Tokens, (b, n, e).
        route: The modality of every token, or None.
        chunk_size: Tokens at once, of all sequences together.
        second_run: Whether this is the second run.

    Returns:
        What the function returns for all tokens, (b, n, e); in the second run nothing of use.
    """
    parts = x.split(max(1, chunk_size // max(1, len(x))), dim=1)
    if second_run.is_on:
        runs: list[Callable[[Tensor], Tensor]] = [_same for _ in parts]
    else:
        routes = split_route(route, [part.shape[1] for part in parts])
        runs = [partial(run, route=part_route) for part_route in routes]
    outs = [
        checkpoint(run_part, part, use_reentrant=False)
        for run_part, part in zip(runs, parts, strict=True)
    ]
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


def _offloading(saving: MemorySaving, x: Tensor) -> AbstractContextManager[object]:
    return save_on_cpu(pin_memory=x.is_cuda) if saving.offload else nullcontext()


@contextmanager
def _same_casts(saving: MemorySaving) -> Iterator[None]:
    """Lets autocast cast weights in the second run as often as in the first, which is counted."""
    was_enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(was_enabled and not saving.keep_attention)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(was_enabled)


def _same(x: Tensor) -> Tensor:
    return x


def _attention_ops() -> list[torch._ops.OpOverload]:
    """Lists the ops that attend; those over several processes exist once they are imported."""
    ops = torch.ops.longnet_zoo
    names = ("dilated_attention", "parallel_dilated_attention", "ring_attention")
    return [getattr(ops, name).default for name in names if hasattr(ops, name)]


@contextmanager
def _offloadable(keeping: AbstractContextManager[object]) -> Iterator[None]:
    """Lets the hooks of `save_on_cpu` have what is kept, where PyTorch can do it."""
    # `checkpoint` would set it back to None, which warns, if it saw the context itself.
    keeping.respect_saved_tensors_hooks = True  # type: ignore[attr-defined]
    with keeping:
        yield
