"""Every family at a tiny size, as something to run: a model, inputs of a length, one output."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from longnet_zoo.factory import create_model
from longnet_zoo.layers import MultiheadDilatedAttention
from longnet_zoo.ops.pattern import DilatedPattern

from . import beit3_draws, slides, small_audio, small_clip, small_multimodal, small_vision

# Awkward on purpose: rates do not divide segments or heads.
PATTERN = {"segment_lengths": (7, 16, 30), "dilation_rates": (1, 2, 3)}
VOCAB_SIZE, EMBED_DIM = 61, 24
TEXT = {"vocab_size": VOCAB_SIZE, "embed_dim": EMBED_DIM, "num_layers": 1, "num_heads": 4}


class Family(NamedTuple):
    """What to make, what to feed it for about so many tokens, and how to call it."""

    make: Callable[[], nn.Module]
    draw: Callable[[int], tuple[Tensor | None, ...]]
    call: Callable[..., Tensor] = lambda model, *inputs: model(*inputs)


def _text(name: str, call=Family._field_defaults["call"], draw=None, **options) -> Family:
    return Family(
        make=lambda: create_model(name, **{**TEXT, **PATTERN, "ffn_dim": 40, **options}),
        draw=draw or (lambda length: tuple(torch.randint(VOCAB_SIZE, (2, 2, length)).unbind())),
        call=call,
    )


def _loss(model, tokens, labels):
    return model.loss(tokens, labels, reduction="sum")


def _one_draw(length: int) -> tuple[Tensor]:
    return (torch.randint(VOCAB_SIZE, (2, length)),)


def _padded_draw(length: int) -> tuple[Tensor, Tensor]:
    mask = torch.arange(length) >= torch.tensor([[length], [length - length // 3]])
    return *_one_draw(length), mask


def _packed_draw(length: int) -> tuple[Tensor, Tensor]:
    bounds = [0, length // 3, *range(length // 2, length, 7), length]
    return _one_draw(length)[0][:1], torch.tensor(bounds, dtype=torch.int32)


def _slides(draw=None, **options) -> Family:
    return Family(
        make=lambda: slides.make_encoder(num_layers=1, **options),
        draw=draw or (lambda length: slides.draw_slides(num_tiles=length)),
    )


def _padded_slides(length: int) -> tuple[Tensor, Tensor, Tensor]:
    mask = torch.arange(length) >= torch.tensor([[length], [length - length // 3]])
    return *slides.draw_slides(num_tiles=length), mask


def _beit3(*, has_image: bool, has_text: bool) -> Family:
    def draw(length: int) -> tuple[Tensor | None, Tensor | None]:
        image, _, _ = beit3_draws.draw()
        tokens = torch.randint(VOCAB_SIZE, (3, 2 + length // 9))
        return image if has_image else None, tokens if has_text else None

    options = {**beit3_draws.DILATED, "num_layers": 1, "num_classes": 5}
    return Family(make=lambda: beit3_draws.make(**options), draw=draw)


def _audio(draw=None, **options) -> Family:
    return Family(
        make=lambda: small_audio.make(num_layers=1, **options),
        draw=draw or (lambda length: (small_audio.draw(length),)),
    )


def _padded_audio(length: int) -> tuple[Tensor, Tensor]:
    waveform = small_audio.draw(length)
    return waveform, torch.tensor([waveform.shape[1], waveform.shape[1] * 2 // 3])


def _clip() -> Family:
    one_layer = {name: {**small_clip.SMALL[name], "num_layers": 1} for name in ("image", "text")}
    return Family(
        make=lambda: small_clip.make(**one_layer, max_text_len=100),
        draw=lambda length: small_clip.draw(seq_len=length),
        call=lambda model, image, tokens: model.contrastive_loss(image, tokens),
    )


def _multimodal(*names: str, is_padded: bool = False) -> Family:
    def draw(length: int) -> tuple[Tensor, ...]:
        drawn = small_multimodal.draw(2, length)
        mask = torch.arange(length + 2) >= torch.tensor([[length + 2], [length - length // 3]])
        given = (*(drawn[name] for name in names), drawn["tiles"], torch.rand(length + 2))
        return (*given, mask) if is_padded else given

    def call(model: nn.Module, *inputs: Tensor) -> Tensor:
        mask, inputs = (inputs[-1], inputs[:-1]) if is_padded else (None, inputs)
        given = dict(zip((*names, "tiles"), inputs[:-1], strict=True))
        masks = None if mask is None else {"tiles": mask}
        return model(given, times={"tiles": inputs[-1]}, padding_masks=masks)

    make = partial(small_multimodal.make, (*names, "tiles"), num_layers=1)
    return Family(make=make, draw=draw, call=call)


def _attention() -> nn.Module:
    return MultiheadDilatedAttention(
        embed_dim=EMBED_DIM, num_heads=4, pattern=DilatedPattern(**PATTERN)
    )


FAMILIES = {
    "decoder": _text("longnet_lm_tiny", draw=_one_draw),
    "decoder_loss": _text("longnet_lm_tiny", _loss),
    "decoder_alibi": _text("longnet_lm_tiny", _loss, position="alibi"),
    "encoder_loss": _text("longnet_mlm_tiny", _loss),
    "encoder_relative": _text("longnet_mlm_tiny", _loss, position="relative"),
    "slides": _slides(pool="mean"),
    "slides_as_published": _slides(**slides.PUBLISHED),
    "longvit": Family(
        make=lambda: small_vision.make(num_layers=1),
        draw=lambda length: (small_vision.draw(height=4 * (length // 5)),),
    ),
    "beit3_image": _beit3(has_image=True, has_text=False),
    "beit3_text": _beit3(has_image=False, has_text=True),
    "beit3_pair": _beit3(has_image=True, has_text=True),
    "audio_waveform": _audio(num_classes=5, head="frames", **small_audio.WAVEFORM),
    "multimodal": _multimodal("video"),
    "attention_layer": Family(
        make=_attention,
        draw=lambda length: (torch.randn(2, length, EMBED_DIM),),
        call=lambda layer, x: layer(x, x, x, is_causal=True, need_weights=False)[0],
    ),
}
# Those whose masks are read, which decides what is computed.
MASKED_FAMILIES = {
    "decoder_padded": _text(
        "longnet_lm_tiny",
        lambda model, tokens, mask: model(tokens, key_padding_mask=mask),
        draw=_padded_draw,
    ),
    "encoder_packed": _text(
        "longnet_mlm_tiny",
        lambda model, tokens, bounds: model(tokens, cu_seqlens=bounds),
        draw=_packed_draw,
    ),
    "slides_padded": _slides(_padded_slides),
    "clip_loss": _clip(),
    "audio_padded": _audio(_padded_audio, num_classes=5),
    "multimodal_padded": _multimodal("sound", is_padded=True),
}
