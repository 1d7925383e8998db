"""Cross-entropy of a linear head over long sequences, without the logits of the whole sequence.

Logits exist for one chunk of rows at a time, in the forward pass and, computed again, in the
backward pass. Nothing but one log-sum-exp per row is kept between the two.

    loss_i = logsumexp_v(x_i . w_v + bias_v) - (x_i . w_y + bias_y),    y = labels_i

Shape legend: n rows, e embed_dim, v vocab_size.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

__all__ = ["linear_cross_entropy"]

Reduction = Literal["mean", "sum", "none"]

# Memory of a chunk of logits. A GPU needs larger products than a CPU to be busy.
_CPU_CHUNK_BYTES = 64 * 2**20
_ACCELERATOR_CHUNK_BYTES = 512 * 2**20


def linear_cross_entropy(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Computes `cross_entropy(linear(features, weight, bias), labels)` chunk by chunk.

    Differs from `torch.nn.functional.cross_entropy` in three points: the mean over no label at all
    is 0, not NaN, with zero gradients; half types are multiplied as such but the softmax and the
    loss are float32; there is no second derivative. Under autocast the products run in its dtype.

    Args:
        features: Outputs of the network, (..., embed_dim).
        weight: Weight of the head, (vocab_size, embed_dim), dtype of `features`.
        labels: Index of the right class, int64 (...).
        bias: Bias of the head, (vocab_size,), dtype of `features`.
        ignore_index: Label of rows without loss; they cost no computation.
        chunk_size: Rows whose logits exist at once; None: as many as fit 64 MiB on a CPU, 512 MiB
            elsewhere.
        reduction: `"mean"` over the rows with a label, `"sum"` or `"none"`.

    Returns:
        Loss, float32 (float64 for float64 input): a scalar, or for `"none"` the shape of `labels`
        with 0 for ignored rows.

    Raises:
        ValueError: If shapes do not fit, a label is no class, or an option is outside its range.
        TypeError: If dtypes do not fit.

    Example:
        >>> features, weight = torch.randn(2, 1000, 64), torch.randn(5000, 64)
        >>> loss = linear_cross_entropy(features, weight, torch.randint(5000, (2, 1000)))
    """
    features, weight = _autocast(features), _autocast(weight)
    bias = None if bias is None else _autocast(bias)
    _check_arguments(features, weight, labels, bias, chunk_size, reduction)
    if chunk_size is None:
        is_cpu = features.device.type == "cpu"
        chunk_bytes = _CPU_CHUNK_BYTES if is_cpu else _ACCELERATOR_CHUNK_BYTES
        chunk_size = max(chunk_bytes // (4 * weight.shape[0]), 1)
    rows, row_labels = features.reshape(-1, features.shape[-1]), labels.reshape(-1)
    losses, _ = torch.ops.longnet_zoo.linear_cross_entropy(
        rows, weight, bias, row_labels, ignore_index, chunk_size
    )
    if reduction == "none":
        return losses.reshape(labels.shape)
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (row_labels != ignore_index).sum().clamp(min=1)


def _check_arguments(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    chunk_size: int | None,
    reduction: str,
) -> None:
    if features.ndim < 1 or weight.ndim != 2 or features.shape[-1] != weight.shape[1]:
        raise ValueError(
            "features must be (..., embed_dim) and weight (vocab_size, embed_dim), got "
            f"{tuple(features.shape)} and {tuple(weight.shape)}."
        )
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be an int64 tensor, got {type(labels).__name__}.")
    if labels.shape != features.shape[:-1]:
        raise ValueError(
            "labels must have the shape of features without embed_dim, "
            f"{tuple(features.shape[:-1])}, got {tuple(labels.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must be (vocab_size,) = {tuple(weight.shape[:1])}, got {tuple(bias.shape)}."
        )
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}. Convert with labels.long().")
    dtypes = [x.dtype for x in (features, weight, bias) if x is not None]
    if len(set(dtypes)) > 1 or not features.is_floating_point():
        raise TypeError(
            "features, weight and bias must share one floating dtype, got "
            f"{', '.join(map(str, dtypes))}. Cast them, or use autocast."
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 row, got {chunk_size}.")
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {get_args(Reduction)}, got {reduction!r}.")


def _autocast(x: Tensor) -> Tensor:
    device_type = x.device.type
    # Meta tensors know no autocast; asking raises.
    is_cast = x.is_floating_point() and x.dtype != torch.float64 and not x.is_meta
    if is_cast and torch.is_autocast_enabled(device_type):
        return x.to(torch.get_autocast_dtype(device_type))
    return x


def _forward(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Returns the loss and the log-sum-exp of each row, 0 for ignored rows."""
    losses = torch.zeros(labels.shape, dtype=_sum_dtype(features), device=features.device)
    lse = torch.zeros_like(losses)
    for rows in _labelled_chunks(labels, ignore_index, chunk_size, weight.shape[0]):
        logits = _logits(features[rows], weight, bias)
        own_logits = logits.gather(1, _classes(labels[rows], ignore_index)).squeeze(1)
        # In place, so that one buffer of the chunk's size is all there is.
        largest = logits.amax(dim=1)
        row_lse = logits.sub_(largest[:, None]).exp_().sum(dim=1).log_().add_(largest)
        del logits  # Not beside the logits of the next chunk.
        is_ignored = labels[rows] == ignore_index
        lse[rows] = row_lse
        losses[rows] = (row_lse - own_logits).masked_fill_(is_ignored, 0.0)
    return losses, lse


def _backward(
    losses_grad: Tensor,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    ignore_index: int,
    chunk_size: int,
    needs_grad: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of features, weight and bias; an empty tensor if not needed."""
    sum_dtype = lse.dtype
    features_grad, weight_grad, bias_grad = _gradients(features, weight, bias, needs_grad)
    # Autocast is over: a backward inside it would make other logits than the forward did.
    with torch.autocast(features.device.type, enabled=False):
        for rows in _labelled_chunks(labels, ignore_index, chunk_size, weight.shape[0]):
            chunk = features[rows]
            logits = _logits(chunk, weight, bias)
            row_grad = losses_grad[rows].masked_fill(labels[rows] == ignore_index, 0.0)
            # The gradient of the logits is (softmax - one_hot) * row_grad, in place again.
            logits_grad = logits.sub_(lse[rows][:, None]).exp_().mul_(row_grad[:, None])
            logits_grad.scatter_add_(1, _classes(labels[rows], ignore_index), -row_grad[:, None])
            if needs_grad[2]:
                bias_grad += logits_grad.sum(dim=0)
            logits_grad = logits_grad.to(features.dtype)
            if needs_grad[0]:
                features_grad[rows] = logits_grad @ weight
            if needs_grad[1] and sum_dtype == features.dtype:
                weight_grad.addmm_(logits_grad.t(), chunk)
            elif needs_grad[1]:
                # Sums over chunks stay float32 for half types.
                weight_grad += logits_grad.t() @ chunk
            del logits, logits_grad  # Not beside the logits of the next chunk.
    dtype = features.dtype
    return features_grad, weight_grad.to(dtype), bias_grad.to(dtype)


def _gradients(
    features: Tensor, weight: Tensor, bias: Tensor | None, needs_grad: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    sum_dtype = _sum_dtype(features)
    return (
        torch.zeros_like(features) if needs_grad[0] else features.new_empty(0),
        torch.zeros_like(weight, dtype=sum_dtype) if needs_grad[1] else weight.new_empty(0),
        features.new_zeros(0 if bias is None else bias.shape, dtype=sum_dtype),
    )


def _logits(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = (features @ weight.t()).to(_sum_dtype(features))
    return logits if bias is None else logits.add_(bias)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _classes(labels: Tensor, ignore_index: int) -> Tensor:
    return labels.masked_fill(labels == ignore_index, 0)[:, None]


def _labelled_chunks(
    labels: Tensor, ignore_index: int, chunk_size: int, vocab_size: int
) -> list[slice] | list[Tensor]:
    """Splits the rows that have a label: slices if all rows have one, else index tensors."""
    num_rows = len(labels)
    slices = [slice(i, min(i + chunk_size, num_rows)) for i in range(0, num_rows, chunk_size)]
    if labels.is_cuda and torch.cuda.is_current_stream_capturing():
        return slices  # Reading the labels would end the capture of a CUDA graph.
    indices = (labels != ignore_index).nonzero().squeeze(1)
    used = labels[indices]
    is_outside = (used < 0) | (used >= vocab_size)
    if is_outside.any():
        raise ValueError(
            f"labels must lie in [0, vocab_size) or be ignore_index={ignore_index}, got "
            f"{used[is_outside][0].item()} for vocab_size={vocab_size}."
        )
    if len(indices) == num_rows:
        return slices
    return list(indices.split(chunk_size)) if len(indices) else []


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, weight, bias, labels, ctx.ignore_index, ctx.chunk_size = inputs
    ctx.save_for_backward(features, weight, bias, labels, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, losses_grad: Tensor, _: Tensor) -> Any:
    features, weight, bias, labels, lse = ctx.saved_tensors
    needs_grad = list(ctx.needs_input_grad[:3])
    grads = torch.ops.longnet_zoo.linear_cross_entropy_backward(
        losses_grad,
        features,
        weight,
        bias,
        labels,
        lse,
        ctx.ignore_index,
        ctx.chunk_size,
        needs_grad,
    )
    used = [grad if needed else None for grad, needed in zip(grads, needs_grad, strict=True)]
    return *used, None, None, None


_INPUTS = "Tensor features, Tensor weight, Tensor? bias, Tensor labels"
_custom_op = torch.library.custom_op(
    "longnet_zoo::linear_cross_entropy",
    _forward,
    mutates_args=(),
    schema=f"({_INPUTS}, int ignore_index, int chunk_size) -> (Tensor, Tensor)",
)
_custom_backward = torch.library.custom_op(
    "longnet_zoo::linear_cross_entropy_backward",
    _backward,
    mutates_args=(),
    schema=(
        f"(Tensor losses_grad, {_INPUTS}, Tensor lse, int ignore_index, int chunk_size, "
        "bool[] needs_grad) -> (Tensor, Tensor, Tensor)"
    ),
)
_custom_op.register_autograd(_differentiate, setup_context=_save)


@_custom_op.register_fake
def _fake_forward(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    losses = features.new_empty(labels.shape, dtype=_sum_dtype(features))
    return losses, torch.empty_like(losses)


@_custom_backward.register_fake
def _fake_backward(
    losses_grad: Tensor,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    ignore_index: int,
    chunk_size: int,
    needs_grad: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    features_grad, weight_grad, bias_grad = _gradients(features, weight, bias, needs_grad)
    return features_grad, weight_grad.to(features.dtype), bias_grad.to(features.dtype)
