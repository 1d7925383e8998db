"""The byte vocabulary of our small models as a tokenizer of Transformers."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

__all__ = ["make_byte_tokenizer"]

_SPECIAL_TOKENS = _EOD, _MASK, _PAD = ("<|endoftext|>", "<|mask|>", "<|pad|>")


def make_byte_tokenizer(*, split_special_tokens: bool = False) -> PreTrainedTokenizerFast:
    """Makes the tokenizer of models over bytes, with the ids of `longnet_zoo.tokenizers`.

    Ids 0-255 are the bytes of a text, 256 ("<|endoftext|>") ends a document, 257 ("<|mask|>")
    masks, 258 ("<|pad|>") pads, on the left. Saved beside a model, it is what `AutoTokenizer` and
    pipelines find.

    Args:
        split_special_tokens: Whether special tokens that are spelt out in a text are read as plain
            characters, so that a document cannot end itself: as `longnet_zoo.tokenizers` does.

    Returns:
        A fast tokenizer, which needs nothing of this package once it is saved.

    Example:
        >>> make_byte_tokenizer()("Hi").input_ids
        [72, 105]
    """
    tokens = [*_byte_characters(), *_SPECIAL_TOKENS]
    # No merges: every byte stays a token.
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in _SPECIAL_TOKENS]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=_EOD,
        mask_token=_MASK,
        pad_token=_PAD,
        padding_side="left",
        split_special_tokens=split_special_tokens,
        clean_up_tokenization_spaces=False,
    )


def _byte_characters() -> list[str]:
    """Lists the character that stands for each byte in byte-level vocabularies, GPT-2's alphabet.

    Printable bytes stand for themselves, the others take the characters from 256 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
