"""The blockwise parallel Transformer (arXiv 2305.19370) inside causal models of Transformers.

    model = patch_blockwise(AutoModelForCausalLM.from_pretrained(folder), chunk_size=4096)

The model's own feed-forward networks run on some tokens at a time and again in the backward pass,
so that their hidden channels exist for these tokens alone; and the loss is computed from the
features and the output head without the logits of the whole batch. Results and gradients, names of
parameters and files stay what they are.

Shape legend: b batch, n seq_len, e embed_dim, v vocab_size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from longnet_zoo.layers.memory import SecondRun, run_in_chunks
from longnet_zoo.ops.cross_entropy import linear_cross_entropy

__all__ = ["patch_blockwise", "unpatch_blockwise"]

# How models call the feed-forward network of a decoder layer.
_FEED_FORWARD_NAMES = ("mlp", "feed_forward")

Model = TypeVar("Model", bound=nn.Module)


def patch_blockwise(
    model: Model,
    *,
    chunk_size: int = 4096,
    use_chunked_loss: bool = True,
    keep_eval_logits: bool = True,
) -> Model:
    """Lets a causal model compute feed-forward networks and loss for some tokens at a time.

    Gradient checkpointing of the model may be on or off. Patching again replaces the options;
    `unpatch_blockwise` takes everything back. Weights must be whole where the loss is computed: not
    spread by FSDP or DeepSpeed ZeRO-3.

    Args:
        model: A causal model of Transformers (Llama, Qwen, Mistral, GPT-NeoX, ...), wrapped by PEFT
            or not; patch it before it is wrapped for several processes.
        chunk_size: Tokens, of all sequences of a batch together, whose hidden feed-forward channels
            exist at once.
        use_chunked_loss: Whether `model(..., labels=labels)` computes the loss in chunks as well.
            In training `logits` of its output is then None. A mean over no label at all is 0.
        keep_eval_logits: Whether `logits` stay in evaluation, where metrics may want them, and the
            loss is computed from them. False: as in training.

    Returns:
        The model.

    Raises:
        TypeError: If the model is no model of Transformers, or `chunk_size` no integer.
        ValueError: If no feed-forward networks are found, `chunk_size` is below 1, or
            `keep_eval_logits` is given where it has no effect.
        NotImplementedError: If feed-forward networks are mixtures of experts, or the loss is not
            the usual one of causal models.

    Example:
        >>> model = patch_blockwise(AutoModelForCausalLM.from_pretrained(folder), chunk_size=4096)
        >>> model(input_ids, labels=input_ids).loss.backward()
    """
    if type(chunk_size) is not int:
        raise TypeError(f"chunk_size must be an integer, got {chunk_size!r}.")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 token, got {chunk_size}.")
    if not keep_eval_logits and not use_chunked_loss:
        raise ValueError(
            "keep_eval_logits=False needs the loss in chunks, got use_chunked_loss=False."
        )
    network = _network(model)
    feed_forwards = _feed_forwards(network)
    if use_chunked_loss:
        _checked_head(network)
    unpatch_blockwise(model)
    for feed_forward in feed_forwards:
        feed_forward.forward = _ChunkedFeedForward(feed_forward, chunk_size)
    if use_chunked_loss:
        network.forward = _ModelWithChunkedLoss(network, keep_eval_logits)
    return model


def unpatch_blockwise(model: Model) -> Model:
    """Takes back what `patch_blockwise` did, if it did.

    Args:
        model: The model, wrapped or not.

    Returns:
        The model.
    """
    for module in model.modules():
        patch = vars(module).get("forward")
        if isinstance(patch, _Forward):
            patch.remove()
    return model


class _Forward:
    """Stands for the `forward` of one module.

    An object with a reference, and not a function around it, so that a copy of the model refers to
    the module in the copy.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        # Set by others before, such as hooks of Accelerate; a class's own is looked up as usual.
        self.before = vars(module).get("forward")

    @property
    def original(self) -> Callable[..., Any]:
        return self.before or type(self.module).forward.__get__(self.module)

    @property
    def __signature__(self) -> inspect.Signature:
        # Trainer and `generate` ask which arguments a model takes.
        return inspect.signature(self.original)

    def remove(self) -> None:
        if self.before is None:
            del self.module.forward
        else:
            self.module.forward = self.before


class _ChunkedFeedForward(_Forward):
    """Runs a module of single tokens in chunks, each computed again in the backward pass."""

    def __init__(self, module: nn.Module, chunk_size: int) -> None:
        super().__init__(module)
        self.chunk_size = chunk_size

    def __call__(self, hidden_states: Tensor) -> Tensor:
        if not torch.is_grad_enabled() and hidden_states[..., 0].numel() <= self.chunk_size:
            return self.original(hidden_states)  # A step of decoding.
        return run_in_chunks(
            # Some layers (GPT-2's) want memory without gaps; a copy lives as long as the chunk.
            lambda x, route: self.original(x.contiguous()),
            hidden_states,
            None,
            chunk_size=self.chunk_size,
            second_run=SecondRun(),
        )


class _ModelWithChunkedLoss(_Forward):
    """Runs a causal model whose head, where labels are given, makes no logits of all tokens."""

    def __init__(self, module: nn.Module, keep_eval_logits: bool) -> None:
        super().__init__(module)
        self.keep_eval_logits = keep_eval_logits

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        network: Any = self.module
        given = inspect.signature(self.original).bind_partial(*args).arguments | kwargs
        is_plain = self.keep_eval_logits and not network.training
        if is_plain or given.get("labels") is None:
            return self.original(*args, **kwargs)
        with _features_for_logits(network) as loss:
            outputs = self.original(*args, **kwargs)
        if not loss.is_computed:
            raise NotImplementedError(
                "use_chunked_loss=True needs a model that computes its loss by its loss_function, "
                f"got {type(network).__name__}. Pass use_chunked_loss=False."
            )
        if isinstance(outputs, tuple):
            return tuple(output for output in outputs if output is not loss.features)
        kept = {key: output for key, output in outputs.items() if output is not loss.features}
        return type(outputs)(**kept)


class _LossOfFeatures:
    """The usual loss of causal models, of features that stand for their logits."""

    def __init__(self, head: nn.Linear) -> None:
        self.head = head
        self.features: Tensor | None = None
        self.is_computed = False

    def keep(self, features: Tensor) -> Tensor:
        """Takes the place of the head."""
        self.features = features
        return features

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        if logits is not self.features:
            raise NotImplementedError(
                "use_chunked_loss=True needs logits that go from the output head to the loss "
                "unchanged, got a model that scales, caps or casts them. "
                "Pass use_chunked_loss=False."
            )
        self.is_computed = True
        weight = self.head.weight
        if shift_labels is None:
            # The label of a token is the next one.
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        loss = linear_cross_entropy(
            logits.to(weight.device),
            weight,
            shift_labels.to(weight.device).reshape(logits.shape[:-1]),
            bias=self.head.bias,
            ignore_index=ignore_index,
            reduction="mean" if num_items_in_batch is None else "sum",
        )
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss if num_items_in_batch is None else loss / num_items_in_batch


@contextmanager
def _features_for_logits(network: Any) -> Iterator[_LossOfFeatures]:
    """Lets the head of a model hand on its features, and the loss take them, for one call."""
    head: Any = _checked_head(network)
    loss = _LossOfFeatures(head)
    before = {module: dict(vars(module)) for module in (head, network)}
    head.forward = loss.keep
    network.loss_function = loss
    try:
        yield loss
    finally:
        for module, name in ((head, "forward"), (network, "_loss_function")):
            if name in before[module]:
                setattr(module, name, before[module][name])
            else:
                delattr(module, name)


def _network(model: nn.Module) -> PreTrainedModel:
    """Finds the model of Transformers in what wraps it."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise TypeError(
        f"model must be a model of Hugging Face Transformers, got {type(model).__name__}."
    )


def _feed_forwards(network: PreTrainedModel) -> list[nn.Module]:
    """Finds the feed-forward networks of the layers, which lie in a list."""
    found = []
    for name, module in network.get_decoder().named_modules():
        path = name.split(".")
        if len(path) > 1 and path[-2].isdigit() and path[-1] in _FEED_FORWARD_NAMES:
            found.append(module)
    if not found:
        lists = [m for m in network.modules() if isinstance(m, nn.ModuleList) and len(m)]
        parts = [f"{type(m[0]).__name__} of {list(m[0]._modules)}" for m in lists]
        raise ValueError(
            "patch_blockwise needs layers with a feed-forward network named as one of "
            f"{_FEED_FORWARD_NAMES}, found in {type(network).__name__} layers {parts}."
        )
    for module in found:
        _check_feed_forward(module)
    return found


def _check_feed_forward(module: nn.Module) -> None:
    parts = [name for name, _ in module.named_children()]
    inputs = list(inspect.signature(type(module).forward).parameters)[1:]
    if "experts" in parts or len(inputs) != 1:
        raise NotImplementedError(
            "patch_blockwise needs feed-forward networks of the hidden states alone and without "
            f"experts, got {type(module).__name__} of {inputs} with {parts}."
        )


def _checked_head(network: Any) -> nn.Linear:
    """Returns the output head of a model whose loss can be computed from it."""
    head = network.get_output_embeddings()
    is_linear = getattr(type(head), "forward", None) is nn.Linear.forward
    # A LongNet makes its loss in chunks by itself.
    is_linear = is_linear and network.config.model_type != "longnet"
    if not is_linear or network.loss_function is not ForCausalLMLoss:
        raise NotImplementedError(
            "use_chunked_loss=True needs a torch.nn.Linear as output head and the loss of causal "
            f"models, got {type(head).__name__} and {network.loss_function} from "
            f"{type(network).__name__}. Pass use_chunked_loss=False."
        )
    return head
