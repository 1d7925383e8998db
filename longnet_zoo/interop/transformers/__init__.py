"""Hugging Face Transformers: our models under its conventions, and dilated attention inside others.

Importing this package registers the models with the Auto classes, and `"longnet_dilated"` as an
attention implementation.
"""

from .attention import ATTENTION_NAME, set_pattern
from .blockwise import patch_blockwise, unpatch_blockwise
from .cache import LongNetCache
from .config import LongNetConfig
from .models import LongNetForCausalLM, LongNetForMaskedLM, LongNetModel
from .tokenizer import make_byte_tokenizer

__all__ = [
    "ATTENTION_NAME",
    "LongNetCache",
    "LongNetConfig",
    "LongNetForCausalLM",
    "LongNetForMaskedLM",
    "LongNetModel",
    "make_byte_tokenizer",
    "patch_blockwise",
    "set_pattern",
    "unpatch_blockwise",
]
