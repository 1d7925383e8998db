"""Small models of ours under Transformers' conventions, for the tests of that package."""

import torch
from transformers import PreTrainedModel

from longnet_zoo.interop.transformers import (
    LongNetConfig,
    LongNetForCausalLM,
    LongNetForMaskedLM,
    LongNetModel,
)

SIZES = {
    "vocab_size": 61,
    "embed_dim": 24,
    "num_layers": 3,
    "num_heads": 3,
    "segment_lengths": (5, 11),
    "dilation_rates": (1, 3),
}
CLASSES = [LongNetModel, LongNetForCausalLM, LongNetForMaskedLM]
HEADS = [LongNetForCausalLM, LongNetForMaskedLM]


def make(model_class: type[PreTrainedModel] = LongNetForCausalLM, **options) -> PreTrainedModel:
    options = {"is_causal": model_class is not LongNetForMaskedLM, **SIZES, **options}
    return model_class(LongNetConfig(**options)).eval()


def make_tokens(batch: int = 2, length: int = 17) -> torch.Tensor:
    return torch.randint(2, SIZES["vocab_size"], (batch, length))


def output_of(model: PreTrainedModel, tokens: torch.Tensor | None, **options) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, **options, return_dict=False)[0]
