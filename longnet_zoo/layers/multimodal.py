"""Attention over any set of modalities: within each one, then across all of them.

Modalities have different lengths and rates. The attention across sees one sequence, in which the
tokens of all modalities are sorted by their time, so that a dilated segment covers the same window
of time in each; see `Timeline`. Every modality has weights of its own. A modality that is missing,
for some samples or for all, costs nothing and leaves the others, to the bit, what they would be in
a module that never had it.

Two modalities of the same rate alternate in that sequence. A branch of dilation rate 2 then shows
a head every second token, hence one modality only: for k such modalities take rates that share no
factor with k, beside the branch of rate 1.

Shape legend: b batch, n tokens of all modalities, n_m those of modality m, e embed_dim, h heads,
d head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from longnet_zoo.ops.dilated_attention import dilated_attention
from longnet_zoo.ops.pattern import DilatedPattern
from longnet_zoo.ops.positions import apply_rotary

from .attention import DilatedAttention
from .feed_forward import Activation, FeedForward
from .memory import MemorySaving, check_not_compiled, run_again_in_backward
from .multiway import Route, make_multiway, run_routed
from .positions import RotaryEmbedding
from .presence import Samples, check_known, check_presence, run_grouped, take_part
from .timeline import Timeline, as_rows

__all__ = ["MultimodalBlock", "MultimodalDilatedAttention", "RotaryTables", "check_samples"]

# Cosine and sine of all tokens in stored order, (b * n or n, d / 2) each.
RotaryTables = tuple[Tensor, Tensor]
Tokens = dict[str, Tensor]


class MultimodalDilatedAttention(nn.Module):
    """Dilated attention within each modality, then across all, each with its norm and residual.

        y_m = x_m + own_m(norm_m(x_m));  out = y + across(norm(y))

    `own_m` has rotary positions 0, 1, ... within the modality; those of `across` follow time.
    Weights start at PyTorch's defaults; see `initialize_weights`.

    Args:
        embed_dim: Channels in and out, a multiple of `num_heads`.
        num_heads: Number of query heads.
        patterns: Pattern of the attention within each modality, by name.
        pattern: Pattern of the attention across all of them.
        time_rate: Rotary positions per unit of time, in the attention across.
        rotary_base: Ratio of the longest to the shortest wavelength.
        num_kv_heads: As for `DilatedAttention`.
        qk_norm: As for `DilatedAttention`.
        sub_ln: As for `DilatedAttention`.
        bias: As for `DilatedAttention`.
        attention_dropout: Dropout of the attention weights in training, in [0, 1).
        dropout: Dropout of what both attentions return, in [0, 1).
        drop_path: Probability per sample and attention to skip it in training, in [0, 1).
        eps: Epsilon of the LayerNorms.
        backend: Kernel of the op.

    Raises:
        ValueError: If there is no modality, a name is no name of a module, or an option is outside
            its range.

    Example:
        >>> short, long = DilatedPattern.geometric(16, 64), DilatedPattern.geometric(64, 256)
        >>> attention = MultimodalDilatedAttention(
        ...     embed_dim=64, num_heads=4, patterns={"video": short, "audio": long}, pattern=long
        ... )
        >>> x = {"video": torch.randn(2, 40, 64), "audio": torch.randn(2, 300, 64)}
        >>> seconds = {"video": torch.arange(40) / 4, "audio": torch.arange(300) / 30}
        >>> out = attention(x, times=seconds)
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        patterns: Mapping[str, DilatedPattern],
        pattern: DilatedPattern,
        time_rate: float = 10.0,
        rotary_base: float = 10000.0,
        num_kv_heads: int | None = None,
        qk_norm: bool = False,
        sub_ln: bool = True,
        bias: bool = True,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        eps: float = 1e-5,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_modality_names(patterns)
        if not 0.0 < time_rate < float("inf"):
            raise ValueError(f"time_rate must be a positive number, got {time_rate}.")
        _check_probabilities(dropout=dropout, drop_path=drop_path)
        self.names = tuple(patterns)
        self.time_rate = time_rate
        attend = partial(DilatedAttention, embed_dim=embed_dim, num_heads=num_heads)
        attend = partial(attend, num_kv_heads=num_kv_heads, qk_norm=qk_norm, sub_ln=sub_ln)
        attend = partial(attend, bias=bias, dropout=attention_dropout, eps=eps, backend=backend)
        norm = partial(nn.LayerNorm, embed_dim, eps=eps)
        self.own_norms = nn.ModuleDict({name: norm() for name in patterns})
        self.own = nn.ModuleDict(
            {
                name: attend(pattern=own, position="rotary", rotary_base=rotary_base)
                for name, own in patterns.items()
            }
        )
        self.across_norm = make_multiway(norm, len(patterns))
        # Its rotation is part of the op, since times may differ from sample to sample.
        self.across = attend(pattern=pattern, position=None, num_modalities=len(patterns))
        self.rotary = RotaryEmbedding(head_dim=embed_dim // num_heads, base=rotary_base)
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(
        self,
        inputs: Mapping[str, Tensor | None],
        *,
        times: Mapping[str, Tensor] | None = None,
        padding_masks: Mapping[str, Tensor] | None = None,
        present: Mapping[str, Tensor | Sequence[bool]] | None = None,
    ) -> Tokens:
        """Attends within and across modalities.

        Args:
            inputs: Tokens of each modality by name, (batch, n_m, embed_dim); absent or None where
                no sample has it.
            times: Time of each token, in any unit, (n_m,) or (batch or 1, n_m); or the place on a
                line of what has a place, see `hilbert_positions`. Modalities without come first.
            padding_masks: Bool (batch, n_m), True = padding.
            present: Whether each sample has a modality, bool (batch,), best on the CPU; absent:
                all have what has an input. What `inputs` hold for the others is never read.

        Returns:
            Tokens of each modality that any sample has, (batch, n_m, embed_dim); 0 for samples
            that do not have it.

        Raises:
            ValueError: If shapes do not fit, a modality is unknown, a time is not finite, or a
                sample has no modality.
            TypeError: If a mask is not bool, or times are no numbers.
        """
        samples, has = check_samples(
            inputs, times, padding_masks, present, names=self.names, embed_dim=self.across.embed_dim
        )
        outs = run_grouped(self._run, samples, has)
        first = next(iter(outs))
        unused = [p for name in self.names if name not in outs for p in self.parameters_of(name)]
        return {**outs, first: take_part(outs[first], unused)}

    def attend(self, x: Tokens, timeline: Timeline, tables: RotaryTables) -> Tokens:
        """Does the same for samples that have the same modalities.

        Args:
            x: Tokens of each modality, (batch, n_m, embed_dim), in the order of the modalities.
            timeline: Where they are in the merged sequence.
            tables: What `rotary_tables` makes of it.
        """
        return self.attend_across(self.attend_within(x, timeline), timeline, tables)

    def attend_within(self, x: Tokens, timeline: Timeline) -> Tokens:
        """Does the first half of it: each modality by itself."""
        masks = timeline.padding_masks
        return {
            name: tokens
            + self._skip(
                self.own[name](self.own_norms[name](tokens), key_padding_mask=masks.get(name))
            )
            for name, tokens in x.items()
        }

    def attend_across(
        self, x: Tokens, timeline: Timeline, tables: RotaryTables, *, op: Any = dilated_attention
    ) -> Tokens:
        """Does the second half of it, by any op with the signature of `dilated_attention`."""
        joined = torch.cat(list(x.values()), dim=1)
        route = Route.split(*(x[name].shape[1] if name in x else 0 for name in self.names))
        out = self.across(
            run_routed(self.across_norm, joined, route),
            route=route,
            attention_op=partial(_attend_in_time, op=op, timeline=timeline, tables=tables),
        )
        return timeline.split(joined + self._skip(out))

    def rotary_tables(self, timeline: Timeline, device: torch.device) -> RotaryTables:
        """Makes what all layers of a model need of the positions, on the device of the tokens."""
        cos, sin = self.rotary(timeline.positions.flatten())
        return cos.to(device), sin.to(device)

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        """Lists the parameters that only one modality has."""
        number = self.names.index(name)
        own = [*self.own_norms[name].parameters(), *self.own[name].parameters()]
        # Of a single modality there are no experts: all is its own.
        mark = f"experts.{number}." if len(self.names) > 1 else "across"
        across = [p for key, p in self.named_parameters() if "across" in key and mark in key]
        return [*own, *across]

    def _run(self, samples: Samples) -> Tokens:
        timeline = Timeline.merge(
            samples.inputs,
            times=samples.times,
            padding_masks=samples.padding_masks,
            time_rate=self.time_rate,
        )
        device = next(iter(samples.inputs.values())).device
        return self.attend(samples.inputs, timeline, self.rotary_tables(timeline, device))

    def _skip(self, update: Tensor) -> Tensor:
        return self.drop_path(self.dropout(update))


class MultimodalBlock(nn.Module):
    """`MultimodalDilatedAttention`, then a feed-forward network for each modality.

    The attribute `memory_saving` says how training saves memory; None, as at first: not at all. Its
    `chunk_size` is of no effect here: the block keeps its input and computes the rest again.

    Args:
        attention: The attention.
        embed_dim: Channels in and out.
        ffn_dim: Hidden channels.
        activation: "gelu" or "swiglu".
        sub_ln: Whether the networks have an inner LayerNorm.
        bias: Whether their linear layers have a bias.
        activation_dropout: Dropout of the hidden activation, in [0, 1).
        dropout: Dropout of what the networks return, in [0, 1).
        drop_path: Probability per sample and network to skip it in training, in [0, 1).
        eps: Epsilon of the LayerNorms.

    Raises:
        ValueError: If a probability is outside its range.
    """

    def __init__(
        self,
        *,
        attention: MultimodalDilatedAttention,
        embed_dim: int,
        ffn_dim: int,
        activation: Activation = "gelu",
        sub_ln: bool = True,
        bias: bool = True,
        activation_dropout: float = 0.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        _check_probabilities(dropout=dropout, drop_path=drop_path)
        feed = partial(FeedForward, embed_dim=embed_dim, ffn_dim=ffn_dim, activation=activation)
        feed = partial(feed, sub_ln=sub_ln, bias=bias, dropout=activation_dropout, eps=eps)
        names = attention.names
        self.attention = attention
        self.ffn_norms = nn.ModuleDict({name: nn.LayerNorm(embed_dim, eps=eps) for name in names})
        self.feed_forwards = nn.ModuleDict({name: feed() for name in names})
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.memory_saving: MemorySaving | None = None

    def forward(self, x: Tokens, timeline: Timeline, tables: RotaryTables) -> Tokens:
        """Runs the block for samples that have the same modalities.

        Args:
            x: As for `MultimodalDilatedAttention.attend`.
            timeline: As for `MultimodalDilatedAttention.attend`.
            tables: As for `MultimodalDilatedAttention.attend`.

        Returns:
            Tokens of each modality, (batch, n_m, embed_dim).
        """
        saving, is_compiled = self.memory_saving, torch.compiler.is_compiling()
        if saving is None or (is_compiled and not torch.is_grad_enabled()):
            return self._run(x, timeline, tables)
        if is_compiled:
            check_not_compiled(saving)

        def run(joined: Tensor, second_run: object) -> Tensor:
            return torch.cat([*self._run(timeline.split(joined), timeline, tables).values()], 1)

        return timeline.split(run_again_in_backward(run, torch.cat([*x.values()], 1), saving))

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        """Lists the parameters that only one modality has."""
        own = [self.ffn_norms[name], self.feed_forwards[name]]
        return [*self.attention.parameters_of(name), *(p for m in own for p in m.parameters())]

    def _run(self, x: Tokens, timeline: Timeline, tables: RotaryTables) -> Tokens:
        x = self.attention.attend(x, timeline, tables)
        return {name: tokens + self._feed(name, tokens) for name, tokens in x.items()}

    def _feed(self, name: str, x: Tensor) -> Tensor:
        fed = self.feed_forwards[name](self.ffn_norms[name](x))
        return self.drop_path(self.dropout(fed))


def check_modality_names(names: Mapping[str, Any] | Sequence[str]) -> None:
    """Checks that there are modalities, with names that modules can have."""
    empty = nn.ModuleDict()  # a module has names that its class has not, such as "training"
    taken = [name for name in names if not str(name).isidentifier() or hasattr(empty, str(name))]
    if taken or not names:
        raise ValueError(
            "modalities must have names like those of variables that nn.ModuleDict does not have, "
            f"at least one, got {taken or list(names)}."
        )


def _check_probabilities(**options: float) -> None:
    for name, value in options.items():
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{name} must be in [0, 1), got {value}.")


def check_samples(
    inputs: Mapping[str, Tensor | None],
    times: Mapping[str, Tensor] | None,
    padding_masks: Mapping[str, Tensor] | None,
    present: Mapping[str, Tensor | Sequence[bool]] | None,
    *,
    names: Sequence[str],
    embed_dim: int,
) -> tuple[Samples, dict[str, list[bool]] | None]:
    """Checks the arguments of `MultimodalDilatedAttention.forward`, and drops what nobody has."""
    found, has = check_presence(inputs, present, names=names)
    check_known("times", times, names)
    check_known("padding_masks", padding_masks, names)
    for name, x in found.items():
        if x.ndim != 3 or x.shape[-1] != embed_dim or x.shape[1] == 0:
            raise ValueError(
                f"inputs[{name!r}] must be (batch, seq_len, embed_dim) with embed_dim={embed_dim} "
                f"and at least one token, got {tuple(x.shape)}."
            )
    rows = {
        name: as_rows(name, own, batch=len(found[name]), length=found[name].shape[1])
        for name, own in (times or {}).items()
        if name in found
    }
    masks = {
        name: check_padding(name, mask, tuple(found[name].shape[:2]))
        for name, mask in (padding_masks or {}).items()
        if name in found
    }
    return Samples(inputs=found, times=rows, padding_masks=masks), has


def check_padding(name: str, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Checks the padding mask of a modality, and returns it."""
    if mask.dtype != torch.bool:
        raise TypeError(f"padding_masks[{name!r}] must be bool, got {mask.dtype}.")
    if tuple(mask.shape) != shape:
        raise ValueError(f"padding_masks[{name!r}] must be {shape}, got {tuple(mask.shape)}.")
    return mask


def _attend_in_time(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: DilatedPattern,
    *,
    op: Any,
    timeline: Timeline,
    tables: RotaryTables,
    key_padding_mask: None = None,
    **options: Any,
) -> Tensor:
    """Attends tokens in stored order, (b, n, h, d), as the merged sequence that they make."""
    assert key_padding_mask is None  # the timeline has it
    q, k = _turned(q, tables), _turned(k, tables)
    q, k, v = (timeline.merged(x) for x in (q, k, v))
    return timeline.stored(op(q, k, v, pattern, key_padding_mask=timeline.is_padding, **options))


def _turned(x: Tensor, tables: RotaryTables) -> Tensor:
    if len(tables[0]) == x.shape[1]:
        return apply_rotary(x, *tables)
    # All samples as one long one, each token with a position of its own.
    return apply_rotary(x.flatten(0, 1)[None], *tables).view_as(x)
