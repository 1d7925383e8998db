import json
import sys

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from longnet_zoo.tokenizers import ByteTokenizer, JsonTokenizer, load_tokenizer

CORPUS = ["def f(x):\n    return x + 1\n", "naïve café — x² 🙂 zzz\n", "import os, sys\n" * 3]


def _save(tokenizer, folder, trainer=None):
    if trainer is not None:
        tokenizer.train_from_iterator(CORPUS, trainer)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture
def byte_level(tmp_path):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    return _save(tokenizer, tmp_path, trainer)


@pytest.fixture
def byte_fallback(tmp_path):
    """The make of Llama's tokenizer: "▁" for a space, and bytes where a character is unknown."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{i:02X}>": 3 + i for i in range(256)}
    for piece in ("▁", "d", "e", "f", "x", "ï", "de", "def"):
        vocab[piece] = len(vocab)
    model = models.BPE(
        vocab=vocab,
        merges=[("d", "e"), ("de", "f")],
        byte_fallback=True,
        fuse_unk=True,
        unk_token="<unk>",
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return _save(tokenizer, tmp_path)


@pytest.fixture
def word_piece(tmp_path):
    vocab = {name: i for i, name in enumerate(["[UNK]", "[SEP]", "[PAD]", "[MASK]", "ab", "##cd"])}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]", "[SEP]", "[PAD]", "[MASK]"])
    return _save(tokenizer, tmp_path)


def test_bytes_are_their_own_ids_and_come_back():
    tokenizer = ByteTokenizer()
    text = bytes(range(256))
    (ids,) = tokenizer.encode_batch([text])
    assert ids.tolist() == list(range(256))
    assert ids.dtype == tokenizer.dtype == np.uint16
    assert tokenizer.decode([104, 105, 256, 257, 258]) == "hi"
    assert (tokenizer.vocab_size, tokenizer.eod_id, tokenizer.mask_id, tokenizer.pad_id) == (
        *(259, 256),
        *(257, 258),
    )
    assert tokenizer.token_bytes.tolist() == [1] * 256 + [0] * 3
    assert tokenizer.regular_ids.tolist() == list(range(256))


def test_byte_level_tokens_count_every_byte(byte_level):
    tokenizer = load_tokenizer(str(byte_level))
    texts = [text.encode() for text in CORPUS]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        # Longer than the truncation and shorter than the padding of the file.
        assert tokenizer.token_bytes[torch.from_numpy(ids.astype(np.int64))].sum() == len(text)
        assert tokenizer.decode(ids.tolist()).encode() == text
    assert max(tokenizer.token_bytes) > 1
    assert tokenizer.vocab_size == 300
    assert tokenizer.dtype == np.uint16
    assert (tokenizer.eod_id, tokenizer.mask_id, tokenizer.pad_id) == (0, 1, None)
    assert tokenizer.regular_ids.tolist() == list(range(2, 300))


def test_special_tokens_spelt_out_in_a_text_are_text(byte_level):
    tokenizer = JsonTokenizer(byte_level)
    text = b"a <|endoftext|> b"
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.eod_id not in ids
    assert tokenizer.decode(ids.tolist()).encode() == text


def test_byte_fallback_tokens_count_every_byte(byte_fallback):
    tokenizer = JsonTokenizer(byte_fallback)
    text = "def xï 🙂 ".encode()
    (ids,) = tokenizer.encode_batch([text])
    assert len(ids) < len(text)
    assert tokenizer.token_bytes[torch.from_numpy(ids.astype(np.int64))].sum() == len(text)
    assert tokenizer.eod_id == 2
    assert tokenizer.mask_id is None


def test_word_pieces_count_without_their_prefix(word_piece):
    tokenizer = JsonTokenizer(word_piece)
    assert tokenizer.token_bytes.tolist() == [0, 0, 0, 0, 2, 2]
    assert (tokenizer.eod_id, tokenizer.mask_id, tokenizer.pad_id) == (1, 3, 2)
    assert tokenizer.regular_ids.tolist() == [4, 5]


def test_end_of_word_counts_as_a_space(tmp_path):
    vocab = {"<eos>": 0, "a": 1, "a</w>": 2}
    model = models.BPE(vocab=vocab, merges=[], end_of_word_suffix="</w>")
    tokenizer = JsonTokenizer(_save(tokenizers.Tokenizer(model), tmp_path))
    assert tokenizer.token_bytes.tolist() == [0, 1, 2]


def test_the_folder_of_a_tokenizer_and_named_tokens_are_taken(byte_level):
    tokenizer = load_tokenizer(
        str(byte_level.parent), eod_token="!", mask_token="<|endoftext|>", pad_token="#"
    )
    vocab = json.loads(byte_level.read_text())["model"]["vocab"]
    assert tokenizer.eod_id == vocab["!"]
    assert tokenizer.mask_id == 0
    assert tokenizer.pad_id == vocab["#"]
    assert not {vocab["!"], vocab["#"], 0} & set(tokenizer.regular_ids.tolist())


def test_gaps_in_the_ids_widen_the_vocabulary(byte_level):
    spec = json.loads(byte_level.read_text())
    spec["model"]["vocab"]["zzz"] = 70_000
    byte_level.write_text(json.dumps(spec))
    tokenizer = JsonTokenizer(byte_level)
    assert tokenizer.vocab_size == 70_001
    assert tokenizer.token_bytes.shape == (70_001,)
    assert tokenizer.dtype == np.int32


def test_a_missing_end_of_document_is_an_error(tmp_path):
    path = _save(tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[])), tmp_path)
    with pytest.raises(ValueError, match=r"special tokens are none. Pass eod_token"):
        JsonTokenizer(path)


def test_an_unknown_token_is_an_error(byte_level):
    with pytest.raises(ValueError, match=r"mask_token must be in the vocab.* got '<hide>', .* 300"):
        JsonTokenizer(byte_level, mask_token="<hide>")


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"got '.*nowhere.json': there is no file .*nowhere.json"):
        load_tokenizer(str(tmp_path / "nowhere.json"))
    with pytest.raises(ValueError, match=r"there is no file .*tokenizer.json"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("content", ["", "{}", "[1, 2]", '{"model": {"type": "BPE"'])
def test_a_damaged_file_is_an_error(tmp_path, content):
    path = tmp_path / "broken.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"broken.json is no readable tokenizer.json: .+ Save it"):
        load_tokenizer(str(path))


def test_bytes_refuse_other_special_tokens():
    with pytest.raises(
        ValueError, match=r"tokenizer='bytes' has fixed .* got {'eod_token': '</s>'}"
    ):
        load_tokenizer("bytes", eod_token="</s>")


def test_a_missing_package_is_named(byte_level, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(RuntimeError, match=r"needs the package tokenizers. .*pip install"):
        load_tokenizer(str(byte_level))
