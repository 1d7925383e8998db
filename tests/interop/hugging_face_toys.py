"""Models of Transformers, small and with large weights, for tests of what is put into them."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from longnet_zoo.interop.transformers import ATTENTION_NAME, set_pattern
from longnet_zoo.ops.pattern import DilatedPattern

VOCAB = 61
HEADS = 6
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": None,
}
CONFIGS = {
    "llama": LlamaConfig(num_key_value_heads=2, **SIZES),
    "qwen2": Qwen2Config(num_key_value_heads=3, **SIZES),
    "qwen3": Qwen3Config(num_key_value_heads=2, head_dim=10, tie_word_embeddings=True, **SIZES),
    "neox": GPTNeoXConfig(**SIZES),
    "mistral": MistralConfig(num_key_value_heads=1, sliding_window=None, **SIZES),
}
# Its layers are no `torch.nn.Linear`.
GPT2 = GPT2Config(
    vocab_size=VOCAB,
    n_embd=48,
    n_layer=2,
    n_head=HEADS,
    resid_pdrop=0.0,
    attn_pdrop=0.0,
    embd_pdrop=0.0,
    eos_token_id=None,
)
ONE_SEGMENT = DilatedPattern(segment_lengths=(64,), dilation_rates=(1,))
# Segments that do not nest and lengths that no rate divides, and the paper's kind of pattern.
UNEVEN = DilatedPattern(segment_lengths=(5, 13, 31), dilation_rates=(1, 3, 4))
NESTED = DilatedPattern.geometric(4, 16)

# Models compute norms and angles in float32, whatever their dtype.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}

every_model = pytest.mark.parametrize("name", CONFIGS)


def build(config: PreTrainedConfig, *, attention: str = "sdpa") -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention)
    # Larger weights than a new model has, so that attention is far from uniform.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def build_dilated(
    config: PreTrainedConfig, pattern: DilatedPattern | None = UNEVEN
) -> PreTrainedModel:
    model = build(config, attention=ATTENTION_NAME).double().eval()
    return model if pattern is None else set_pattern(model, pattern)


def unpatched(model: PreTrainedModel) -> PreTrainedModel:
    other = copy.deepcopy(model)
    other.set_attn_implementation("sdpa")
    return other


def run(model: PreTrainedModel, tokens: Tensor, **options: object) -> Tensor:
    with torch.no_grad():
        return model(tokens, **options).logits


def draw(*shape: int) -> Tensor:
    return torch.randint(1, VOCAB, shape)


def left_padded(lengths: list[int]) -> tuple[Tensor, Tensor]:
    width = max(lengths)
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    return draw(len(lengths), width) * mask, mask.long()
