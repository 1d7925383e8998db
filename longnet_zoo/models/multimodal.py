"""Any set of modalities in one model: an encoder for each, then blocks in which they meet.

Every modality has an encoder (`multimodal_encoders.py`): patches, frames of sound, bytes or vectors
become tokens, which Transformer blocks of its own read. Then come blocks of one dilated attention
per modality, one across all of them in the order of time, and a feed-forward network per modality
(`layers/multimodal.py`); a head for classes sees all that a sample has. A modality that is missing,
in some samples or in all, costs nothing, and what is left is to the bit a model that never had it.

Shape legend: b batch, n_m tokens of modality m, e embed_dim, h heads, d head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from longnet_zoo.layers import MemorySaving, initialize_weights
from longnet_zoo.layers.cross_weights import cross_weights
from longnet_zoo.layers.multimodal import (
    MultimodalBlock,
    RotaryTables,
    check_samples,
)
from longnet_zoo.layers.presence import (
    Samples,
    check_known,
    check_presence,
    own_masks,
    run_grouped,
    take_part,
)
from longnet_zoo.layers.streams import run_side_by_side
from longnet_zoo.layers.timeline import Timeline
from longnet_zoo.registry import register_model

from .base import ZooModel
from .heads import fit_module, masked_mean
from .multimodal_config import (
    AudioModality,
    FramesModality,
    LongNetMultimodalConfig,
    TextModality,
)
from .multimodal_encoders import ModalityEncoder, make_encoder
from .multimodal_parts import QueryPool, drop_modalities, flops_of, make_block
from .patch_encoder import init_weight

__all__ = ["LongNetMultimodal", "longnet_multimodal_tiny"]

Inputs = Mapping[str, Tensor | None]
Presence = Mapping[str, Tensor | Sequence[bool]]
Tokens = dict[str, Tensor]


class LongNetMultimodal(ZooModel):
    """Encoder and classifier of samples that have any of its modalities.

    Inputs are a dict by the names of `config.modalities`, shaped as their kinds say. `times` are in
    one unit for all, `padding_masks` True at padding; both are of what the input consists of: token
    of text, vector, frame of a strip, the whole image, sample of audio (whose `times` are the start
    of the recording). A sample that `present` says lacks a modality is never looked at there.

    On a GPU the encoders run side by side in CUDA streams. Where several processes train,
    parameters without a part in a batch get gradients of zero, so that none waits for them.

    Args:
        config: The options.

    Raises:
        TypeError: If the config is that of another family.
        RuntimeError: If torchaudio is missing, for a modality of audio.

    Example:
        >>> model = longnet_zoo.create_model("longnet_multimodal_tiny", num_classes=10)
        >>> video, sound = torch.randn(2, 4, 3, 32, 32), torch.randn(2, 32000)
        >>> logits = model({"video": video, "audio": sound}, present={"audio": [True, False]})
    """

    config_class = LongNetMultimodalConfig
    config: LongNetMultimodalConfig

    def __init__(self, config: LongNetMultimodalConfig) -> None:
        super().__init__(config)
        self.embed_dim = self.num_features = config.embed_dim
        parts = {modality.name: modality for modality in config.parts}
        self.names = tuple(parts)
        self.encoders = nn.ModuleDict({k: make_encoder(config, x) for k, x in parts.items()})
        self.blocks = nn.ModuleList(
            make_block(config, drop_path=config.drop_path * depth / max(config.num_layers - 1, 1))
            for depth in range(config.num_layers)
        )
        # Magneto's gain for the number of residual connections, three in each block here.
        gain = math.sqrt(math.log(3 * config.num_layers)) if config.norm == "sub_ln" else 1.0
        initialize_weights(self.blocks, gain=gain)
        norm = partial(nn.LayerNorm, config.embed_dim, eps=config.eps)
        self.norms = nn.ModuleDict({name: norm() for name in parts})
        self.query_pool: nn.Module = nn.Identity()
        self.head: nn.Module = nn.Identity()
        self.head_drop = nn.Dropout(config.head_dropout)
        self.reset_classifier(config.num_classes)

    @property
    def num_classes(self) -> int:
        """Outputs of the head; 0 without one."""
        return self.config.num_classes

    def forward(
        self,
        inputs: Inputs,
        *,
        times: Mapping[str, Tensor] | None = None,
        padding_masks: Mapping[str, Tensor] | None = None,
        present: Presence | None = None,
    ) -> Tensor:
        """Computes logits, or pooled features for a model without a head.

        Args:
            inputs: Input of each modality by name, (batch, ...); absent or None where no sample has
                it.
            times: Times of those that have one, (units,) or (batch or 1, units).
            padding_masks: Bool (batch, units), True = padding.
            present: Whether each sample has a modality, bool (batch,), best on the CPU; absent: all
                have what has an input.

        Returns:
            (batch, num_classes), or (batch, embed_dim) without a head.

        Raises:
            ValueError: If shapes do not fit, a modality is unknown, a time is not finite, or a
                sample has no modality.
            TypeError: If an input or a mask is of a wrong dtype.
        """
        samples, has = self._check(inputs, times, padding_masks, present)
        if self.training and self.config.modality_dropout > 0.0:
            has = drop_modalities(samples, has, probability=self.config.modality_dropout)
        out = run_grouped(lambda own: {"": self._logits(own)}, samples, has)[""]
        return take_part(out, self._unused(samples, has))

    def forward_features(
        self,
        inputs: Inputs,
        *,
        times: Mapping[str, Tensor] | None = None,
        padding_masks: Mapping[str, Tensor] | None = None,
        present: Presence | None = None,
    ) -> Tokens:
        """Computes the features of all tokens; no modality is dropped at random.

        Args:
            inputs: As for `forward`.
            times: As for `forward`.
            padding_masks: As for `forward`.
            present: As for `forward`.

        Returns:
            Features of each modality that any sample has, (batch, n_m, embed_dim); 0 for samples
            without it.
        """
        samples, has = self._check(inputs, times, padding_masks, present)
        outs = run_grouped(lambda own: self._features(own)[0], samples, has)
        first = next(iter(outs))
        return {**outs, first: take_part(outs[first], self._unused(samples, has))}

    def forward_head(
        self,
        features: Inputs,
        pre_logits: bool = False,
        *,
        padding_masks: Mapping[str, Tensor] | None = None,
        present: Presence | None = None,
    ) -> Tensor:
        """Pools features and classifies them.

        Args:
            features: What `forward_features` returns.
            pre_logits: Whether to return what the head would get.
            padding_masks: As for `forward`.
            present: As for `forward`.

        Returns:
            As for `forward`.
        """
        check_known("padding_masks", padding_masks, self.names)
        masks = {
            name: self._encoder(name).token_padding(mask, tokens.shape[1])
            for name, mask in (padding_masks or {}).items()
            if (tokens := features.get(name)) is not None
        }
        samples, has = check_samples(
            features, None, masks, present, names=self.names, embed_dim=self.embed_dim
        )
        head = partial(self._head, pre_logits=pre_logits)
        return run_grouped(lambda x: {"": head(x.inputs, x.padding_masks)}, samples, has)[""]

    def attention_weights(
        self,
        inputs: Inputs,
        *,
        times: Mapping[str, Tensor] | None = None,
        padding_masks: Mapping[str, Tensor] | None = None,
    ) -> list[dict[tuple[str, str], Tensor]]:
        """Computes who attends to whom across modalities in each block; for short inputs.

        Args:
            inputs: As for `forward`; every sample has what is there.
            times: As for `forward`.
            padding_masks: As for `forward`.

        Returns:
            For each block what `cross_weights` returns; `modality_shares` sums it up.

        Raises:
            RuntimeError: If the model is in training mode, where dropout would decide.
        """
        if self.training:
            raise RuntimeError("attention_weights needs a model that does not train. Call eval().")
        samples, _ = self._check(inputs, times, padding_masks, None)
        found = []
        with torch.no_grad():
            x, timeline, tables = self._encode(samples)
            for block in self._blocks():
                within = block.attention.attend_within(x, timeline)
                found.append(cross_weights(block.attention, within, timeline, tables))
                x = block(x, timeline, tables)
        return found

    def get_classifier(self) -> nn.Module:
        """Returns the head, an `nn.Identity` where there is none."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head by a new one.

        Args:
            num_classes: Outputs; 0 removes the head.
            global_pool: "avg" or "query"; None: as it is.

        Raises:
            ValueError, TypeError: If `num_classes` is no number of outputs, or the pool unknown.
        """
        pool: Any = self.config.global_pool if global_pool is None else global_pool
        self.config = replace(self.config, num_classes=num_classes, global_pool=pool)
        if pool == "avg":
            self.query_pool = nn.Identity()
        elif isinstance(self.query_pool, nn.Identity):
            new = QueryPool(embed_dim=self.embed_dim, num_heads=self.config.num_heads)
            self.query_pool = fit_module(new, self)
        self.head = nn.Identity()
        if num_classes:
            head = nn.Linear(self.embed_dim, num_classes)
            init_weight(head.weight)
            nn.init.zeros_(head.bias)
            self.head = fit_module(head, self)

    def set_memory_saving(self, saving: MemorySaving | None) -> None:
        """Chooses how training saves memory; see `ZooModel.set_memory_saving`.

        The blocks in which modalities meet keep their inputs alone; `chunk_size` is for the
        encoders' blocks.
        """
        super().set_memory_saving(saving)
        for block in self._blocks():
            block.memory_saving = saving

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Chooses whether whole blocks are computed again in the backward pass, by timm's name."""
        self.set_memory_saving(MemorySaving(chunk_size=None) if enable else None)

    def no_weight_decay(self) -> set[str]:
        """Names the parameters for which weight decay makes no sense: norms, biases, positions."""
        tables = (name for name, _ in self.named_parameters() if name.endswith("pos_embed"))
        return super().no_weight_decay() | set(tables)

    def flops(self, seq_len: int) -> int:
        """Counts the FLOPs for `seq_len` tokens, in equal parts of all modalities."""
        share, rest = divmod(seq_len, len(self.names))
        return self.flops_of({name: share + (i < rest) for i, name in enumerate(self.names)})

    def flops_of(self, lengths: Mapping[str, int]) -> int:
        """Counts the FLOPs for one sample, a multiply-add as two; see `ZooModel.flops`.

        Args:
            lengths: Tokens of each modality that it has.

        Raises:
            ValueError: If a modality is unknown.
        """
        check_known("lengths", lengths, self.names)
        return flops_of(self.config, lengths, encoders=self.encoders, blocks=self._blocks())

    def _blocks(self) -> list[MultimodalBlock]:
        return [block for block in self.blocks if isinstance(block, MultimodalBlock)]

    def _encoder(self, name: str) -> ModalityEncoder:
        encoder = self.encoders[name]
        assert isinstance(encoder, ModalityEncoder)
        return encoder

    def _check(
        self,
        inputs: Inputs,
        times: Mapping[str, Tensor] | None,
        padding_masks: Mapping[str, Tensor] | None,
        present: Presence | None,
    ) -> tuple[Samples, dict[str, list[bool]] | None]:
        found, has = check_presence(inputs, present, names=self.names)
        check_known("times", times, self.names)
        masks = own_masks(padding_masks, found, names=self.names)
        rows = {
            name: self._encoder(name).check_times(found[name], own)
            for name, own in (times or {}).items()
            if name in found
        }
        return Samples(inputs=found, times=rows, padding_masks=masks), has

    def _unused(
        self, samples: Samples, has: Mapping[str, Sequence[bool]] | None
    ) -> list[nn.Parameter]:
        """Lists the parameters of modalities that no sample has."""
        used = samples.inputs if has is None else {name for name in has if any(has[name])}
        return [p for name in self.names if name not in used for p in self._parameters_of(name)]

    def _parameters_of(self, name: str) -> list[nn.Parameter]:
        own = [*self._encoder(name).parameters(), *self.norms[name].parameters()]
        return own + [p for block in self._blocks() for p in block.parameters_of(name)]

    def _encode(self, samples: Samples) -> tuple[Tokens, Timeline, RotaryTables]:
        """Runs the encoders of samples with the same modalities, and merges their tokens."""
        inputs, times, masks = samples.inputs, samples.times, samples.padding_masks
        for name in inputs:
            self._encoder(name).check(inputs[name], masks.get(name))
        works = [
            partial(self._encoder(name), x, times.get(name), masks.get(name))
            for name, x in inputs.items()
        ]
        device = next(iter(inputs.values())).device
        read = [*inputs.values(), *times.values(), *masks.values()]
        encoded = run_side_by_side(works, inputs=read, device=device)
        outs = dict(zip(inputs, encoded, strict=True))
        tokens = {name: out.tokens for name, out in outs.items()}
        timeline = Timeline.merge(
            tokens,
            times={k: out.times for k, out in outs.items() if out.times is not None},
            padding_masks={
                k: out.padding_mask for k, out in outs.items() if out.padding_mask is not None
            },
            time_rate=self.config.time_rate,
        )
        return tokens, timeline, self._blocks()[0].attention.rotary_tables(timeline, device)

    def _features(self, samples: Samples) -> tuple[Tokens, Mapping[str, Tensor]]:
        """Computes features, (b, n_m, e), and the padding of their tokens."""
        x, timeline, tables = self._encode(samples)
        for block in self.blocks:
            x = block(x, timeline, tables)
        return {name: self.norms[name](own) for name, own in x.items()}, timeline.padding_masks

    def _logits(self, samples: Samples) -> Tensor:
        return self._head(*self._features(samples))

    def _head(
        self, features: Tokens, masks: Mapping[str, Tensor], pre_logits: bool = False
    ) -> Tensor:
        if self.config.global_pool == "query":
            pooled = self.query_pool(features, masks)
        else:
            means = [masked_mean(x, masks.get(name)) for name, x in features.items()]
            pooled = torch.stack(means).mean(dim=0)
        pooled = self.head_drop(pooled)
        return pooled if pre_logits else self.head(pooled)


@partial(register_model, family="longnet_multimodal", modality="multimodal")(
    "longnet_multimodal_tiny",
    config=LongNetMultimodalConfig(
        modalities=(
            FramesModality(
                name="video", img_size=32, segment_lengths=(16, 64, 256), frame_rate=1.0
            ),
            AudioModality(name="audio", segment_lengths=(64, 256, 1024)),
            TextModality(name="text", segment_lengths=(128, 512, 2048)),
        ),
        embed_dim=128,
        num_layers=2,
        num_heads=4,
        segment_lengths=(128, 384, 1152),
        dilation_rates=(1, 3, 9),
    ),
    description="Video, sound and text, or any other modalities, for laptops",
    source="this project",
)
def longnet_multimodal_tiny(config: LongNetMultimodalConfig) -> LongNetMultimodal:
    """Builds a small model of three modalities; `modalities` gives it others."""
    return LongNetMultimodal(config)
