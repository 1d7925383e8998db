"""The byte tokenizer, and what finds a model by its folder: pipelines and evaluation harnesses."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from longnet_zoo.interop.transformers import LongNetForMaskedLM, make_byte_tokenizer
from longnet_zoo.tokenizers import ByteTokenizer, load_tokenizer

from .longnet_toys import make

TEXT = "Grüße\n  an €<|endoftext|> 日本\t\x00 it's ."
BYTES = {"vocab_size": 259, "num_layers": 2, "eos_token_id": 256, "pad_token_id": 258}


@pytest.fixture
def folder(tmp_path):
    make(**BYTES).save_pretrained(tmp_path)
    make_byte_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_ids_are_those_of_our_tokenizer(tmp_path):
    ours, theirs = ByteTokenizer(), make_byte_tokenizer(split_special_tokens=True)
    expected = ours.encode_batch([TEXT.encode()])[0].tolist()
    assert theirs(TEXT).input_ids == expected
    assert theirs.decode(expected) == TEXT
    assert (len(theirs), theirs.vocab_size) == (259, 259)
    special = (theirs.eos_token_id, theirs.mask_token_id, theirs.pad_token_id)
    assert special == (ours.eod_id, ours.mask_id, ours.pad_id)
    theirs.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXT).input_ids == expected
    again = load_tokenizer(str(tmp_path))
    assert again.encode_batch([TEXT.encode()])[0].tolist() == expected
    assert torch.equal(again.token_bytes, ours.token_bytes)


def test_all_bytes_are_tokens():
    tokenizer = make_byte_tokenizer()
    every = "".join(map(chr, range(0x0800)))  # UTF-8 of one and two bytes
    ids = tokenizer(every).input_ids
    assert ids == list(every.encode())
    assert tokenizer.decode(ids) == every
    four_bytes = "\U000e0001\U0010ffff\uffff"
    assert tokenizer(four_bytes).input_ids == list(four_bytes.encode())


def test_special_tokens_spelt_out():
    assert make_byte_tokenizer()("a<|mask|>b").input_ids == [97, 257, 98]
    ids = make_byte_tokenizer()("a<|endoftext|>").input_ids
    assert ids == [97, 256]
    assert make_byte_tokenizer().decode(ids, skip_special_tokens=True) == "a"


def test_batches_are_padded_on_the_left(folder):
    batch = AutoTokenizer.from_pretrained(folder)(["a", "bcd"], padding=True)
    assert batch["input_ids"] == [[258, 258, 97], [98, 99, 100]]
    assert dict(batch).keys() == {"input_ids", "attention_mask"}


def test_a_folder_is_enough_for_a_pipeline(folder):
    write = pipeline("text-generation", model=str(folder), device="cpu")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    texts = ["abc", "defghij"]
    (first,), (second,) = write(texts, batch_size=2, return_tensors=True, **options)
    for text, found in ((texts[0], first), (texts[1], second)):
        ids = [i for i in found["generated_token_ids"] if i != 258]
        (alone,) = write(text, return_tensors=True, **options)
        assert ids == alone["generated_token_ids"]
        assert bytes(ids[:-6]).decode() == text


def test_masked_bytes_are_filled_by_a_pipeline():
    model = make(LongNetForMaskedLM, **BYTES)
    fill = pipeline("fill-mask", model=model, tokenizer=make_byte_tokenizer(), device="cpu")
    found = fill("ab<|mask|>c", top_k=3)
    logits = model(torch.tensor([[97, 98, 257, 99]])).logits[0, 2]
    assert [answer["token"] for answer in found] == logits.topk(3).indices.tolist()


def test_a_harness_finds_what_it_asks_for(folder):
    """The calls of lm-evaluation-harness 0.4 for log-likelihoods and for texts up to a stop."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == tokenizer.vocab_size
    assert model.device == torch.device("cpu")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (None, 256)
    # No longest input: the harness then asks the tokenizer, which has none either.
    names = ("n_positions", "max_position_embeddings", "n_ctx")
    assert not any(hasattr(model.config, name) for name in names)

    # Log-likelihoods: rows filled up with zeros on the right, without a mask.
    rows = [tokenizer(text, add_special_tokens=False).input_ids for text in ("The cat sat", "Hi")]
    batch = torch.zeros(2, max(map(len, rows)), dtype=torch.int64)
    for number, row in enumerate(rows):
        batch[number, : len(row)] = torch.tensor(row)
    with torch.no_grad():
        logits = model(batch).logits
        for number, row in enumerate(rows):
            alone = model(torch.tensor([row])).logits[0]
            torch.testing.assert_close(logits[number, : len(row)], alone)

    # Texts: a batch padded on the left, a longest length, a stop.
    inputs = tokenizer(["abc", "defgh"], padding="longest", return_tensors="pt")
    out = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_length=12,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
        do_sample=False,
        stop_strings=["\n"],
        tokenizer=tokenizer,
    )
    assert out.shape[1] <= 12
    assert torch.equal(out[:, :5], inputs["input_ids"])
