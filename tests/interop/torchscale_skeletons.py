"""Modules with the classes, options and weights of torchscale's, which do not compute anything.

They come from the fixtures, so that machines without torchscale test the mapping, LongNet included
(no release on the package index has it), against outputs that torchscale once gave.
"""

import json
from pathlib import Path
from types import SimpleNamespace

from safetensors import safe_open
from torch import nn

FIXTURES = Path(__file__).parents[1] / "fixtures"


def _class(name, module, parent=nn.Module):
    return type(name, (parent,), {"__module__": f"torchscale.{module}"})


Encoder = _class("Encoder", "architecture.encoder")
Decoder = _class("Decoder", "architecture.decoder")
LongNetEncoder = _class("LongNetEncoder", "model.LongNet", Encoder)
LongNetDecoder = _class("LongNetDecoder", "model.LongNet", Decoder)
BEiT3 = _class("BEiT3", "model.BEiT3")
MultiheadAttention = _class("MultiheadAttention", "component.multihead_attention")
DilatedAttention = _class("DilatedAttention", "component.dilated_attention", MultiheadAttention)


def read(name):
    """A module of a fixture, and the fixture's other tensors."""
    with safe_open(FIXTURES / f"torchscale_{name}.safetensors", "pt") as file:
        options = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    weights = {k.removeprefix("model."): x for k, x in tensors.items() if k.startswith("model.")}
    inputs = {k: x for k, x in tensors.items() if not k.startswith("model.")}
    if name == "beit3":
        return build(BEiT3, options, weights), inputs
    part = "decoder" if "decoder" in name else "encoder"
    dense, long = (Decoder, LongNetDecoder) if part == "decoder" else (Encoder, LongNetEncoder)
    return build(long if "longnet" in name else dense, options, weights), inputs


def build(kind, options, weights):
    """A module of a class with these options and weights, in evaluation mode."""
    module = kind()
    module.args = SimpleNamespace(**options)
    body = module
    if kind is BEiT3:
        module.encoder = body = Encoder()
    else:
        body.embed_tokens = body.embed_positions = None
    body.output_projection = None
    body.layers = nn.ModuleList()
    is_dilated = kind in (LongNetEncoder, LongNetDecoder)
    attention = DilatedAttention if is_dilated else MultiheadAttention
    for key, tensor in weights.items():
        _add(module, key, tensor.clone(), attention)
    is_deepnorm = options.get("deepnorm", False)
    for layer in body.layers:
        layer.normalize_before = not is_deepnorm
        layer.alpha = (2 * len(body.layers)) ** 0.25 if is_deepnorm else 1.0
    return module.eval()


def _add(module, key, tensor, attention):
    *path, name = key.split(".")
    for part in path:
        if getattr(module, part, None) is None:
            setattr(module, part, _make(part, tensor, attention))
        module = getattr(module, part)
    if name == "scale":  # xPos
        module.register_buffer(name, tensor)
    else:
        setattr(module, name, nn.Parameter(tensor))


def _make(part, tensor, attention):
    if part == "self_attn":
        return attention()
    if part == "embed_tokens":
        return nn.Embedding(*tensor.shape)
    if part == "output_projection":
        return nn.Linear(*reversed(tensor.shape), bias=False)
    return nn.Module()
