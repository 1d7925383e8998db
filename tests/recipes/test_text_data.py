import itertools
import json

import jsonargparse
import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers

from recipes.text_data import TextDataModule
from recipes.text_splits import pack_splits
from recipes.text_streaming import StreamingConfig


def _write(folder, count=40, size=30):
    folder.mkdir(exist_ok=True, parents=True)
    for i in range(count):
        (folder / f"{i:02}.txt").write_bytes(bytes([33 + i]) * size)
    return str(folder)


@pytest.fixture
def folder(tmp_path):
    return _write(tmp_path / "corpus")


def _texts(module, split):
    """Returns the documents of a split, as the tokens say."""
    tokens = module.packed(split).tokens.tolist()
    texts, start = [], 0
    for place, token in enumerate(tokens):
        if token == module.tokenizer.eod_id:
            texts.append(bytes(tokens[start:place]))
            start = place + 1
    return texts


def test_the_standard_library_is_the_default():
    module = TextDataModule(batch_size=2)
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    assert batch["tokens"].shape == batch["labels"].shape == (2, 8192)
    assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
    assert (module.vocab_size, module.token_bytes.sum()) == (259, 256)
    assert module.summary.num_bytes["train"] > 5_000_000
    assert module.summary.num_bytes["val"] > 300_000
    assert module.summary.fingerprint == module.fingerprint
    assert not set(_texts(module, "train")) & set(_texts(module, "val"))
    again = TextDataModule(batch_size=2)
    assert torch.equal(next(iter(again.train_dataloader()))["tokens"], batch["tokens"])


def test_splits_are_disjoint_and_complete(folder):
    module = TextDataModule(source=folder, seq_len=8, val_fraction=0.3, test_fraction=0.2)
    splits = [_texts(module, split) for split in ("train", "val", "test")]
    assert all(splits)
    found = sorted(itertools.chain.from_iterable(splits))
    assert found == sorted(bytes([33 + i]) * 30 for i in range(40))
    assert [len(s) for s in splits] == list(module.summary.num_documents.values())


def test_a_stage_reads_what_it_needs_once(folder, monkeypatch):
    read = []

    def record(corpus, splits, tokenizer):
        read.append(list(splits))
        return pack_splits(corpus, splits, tokenizer)

    monkeypatch.setattr("recipes.text_splits.pack_splits", record)
    module = TextDataModule(source=folder, seq_len=8, val_fraction=0.3, test_fraction=0.2)
    for stage in ("predict", "validate", "fit", "fit", "test", "test"):
        module.setup(stage)
    assert read == [["val"], ["train"], ["test"]]


def test_loaders_work_without_setup(folder, caplog):
    module = TextDataModule(source=folder, seq_len=8, val_fraction=0.3, test_fraction=0.2)
    sizes = [len(loader()) for loader in (module.train_dataloader, module.val_dataloader)]
    assert len(module.test_dataloader()) * 8 < module.packed("test").num_tokens
    assert sizes[0] == module.packed("train").num_tokens // 8
    assert sizes[1] == (module.packed("val").num_tokens - 1) // 8


def test_the_fingerprint_is_logged(folder, caplog):
    module = TextDataModule(source=folder, seq_len=8)
    with pytest.raises(RuntimeError, match="fingerprint needs the corpus to have been read"):
        _ = module.fingerprint
    assert module.summary is None
    with caplog.at_level("INFO"):
        module.setup("fit")
    assert f"text from {folder!r}: corpus {module.fingerprint}: train " in caplog.text


def test_own_sources_are_held_out_whole(folder, tmp_path):
    val, test = _write(tmp_path / "val", count=3), _write(tmp_path / "test", size=31)
    module = TextDataModule(source=folder, val_source=val, test_source=[test], seq_len=8)
    module.setup("fit")
    assert sorted(_texts(module, "val")) == [bytes([33 + i]) * 30 for i in range(3)]
    # Three documents of the corpus are in the validation, too.
    assert len(_texts(module, "train")) == 37
    assert len(_texts(module, "test")) == 40


@pytest.mark.parametrize("val_source", [None, "corpus/val.txt"])
def test_the_tail_of_one_file_is_held_out(tmp_path, val_source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "corpus", count=0)
    (tmp_path / "corpus/book.txt").write_bytes(bytes(range(100)) * 10)
    (tmp_path / "corpus/val.txt").write_bytes(b"validation")
    module = TextDataModule(
        source="corpus/book.txt",
        val_source=val_source,
        split="tail",
        seq_len=8,
        val_fraction=0.2,
        test_fraction=0.1,
    )
    module.setup("fit")
    module.setup("test")
    tokens = {split: module.packed(split).tokens.tolist() for split in ("train", "val", "test")}
    whole = [*(bytes(range(100)) * 10), 256]
    if val_source is None:
        assert tokens["train"] + tokens["val"] + tokens["test"] == whole
        assert [len(part) for part in tokens.values()] == [701, 200, 100]
    else:
        assert tokens["train"] + tokens["test"] == whole
        assert tokens["val"] == [*b"validation", 256]
    assert module.packed("train").num_bytes == len(tokens["train"]) - tokens["train"].count(256)
    other = TextDataModule(source="corpus/book.txt", split="tail", seq_len=8)
    other.setup("fit")
    assert other.fingerprint != module.fingerprint


def test_a_tail_that_is_not_held_out_is_an_error_that_says_how_to_change_it(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("word " * 100)
    module = TextDataModule(source=str(path), split="tail", seq_len=8, test_fraction=0)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"the test split .* got 0 tokens .* test_fraction"):
            module.packed("test")


def test_tables_and_lists_of_sources_are_read(folder, tmp_path):
    lines = [json.dumps({"body": f"row {i} " * 4}) for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    module = TextDataModule(
        source=[str(tmp_path / "rows.jsonl"), folder],
        column="body",
        seq_len=8,
        val_fraction=0.2,
    )
    texts = [text for split in ("train", "val", "test") for text in _texts(module, split)]
    assert len(texts) == 70
    assert b"row 7 " * 4 in texts


def test_a_pattern_selects_files(folder):
    module = TextDataModule(
        source=folder, pattern="*3.txt", seq_len=8, val_fraction=0, test_fraction=0
    )
    assert len(_texts(module, "train")) == 4


def test_options_reach_the_batches(folder):
    options = {"source": folder, "seq_len": 50, "batch_size": 2}
    confined = next(iter(TextDataModule(**options, confine_to_document=True).train_dataloader()))
    assert confined["tokens"].shape == (1, 100)
    assert confined["cu_seqlens"][-1] == 100
    assert len(confined["cu_seqlens"]) > 3
    usual = TextDataModule(**options, objective="masked").train_dataloader()
    share = [(batch["labels"] >= 0).float().mean() for batch in usual]
    assert sum(share) / len(share) == pytest.approx(0.15, abs=0.03)
    masked = TextDataModule(**options, objective="masked", mask_probability=1.0)
    batch = next(iter(masked.train_dataloader()))
    assert (batch["labels"] >= 0).sum() == (batch["tokens"] != 256).sum()
    assert (batch["tokens"] == masked.tokenizer.mask_id).sum() > 60
    plain, shuffled, reseeded = (
        next(iter(TextDataModule(**options, **more).train_dataloader()))["tokens"]
        for more in ({}, {"shuffle_documents": True}, {"seed": 1})
    )
    assert not torch.equal(plain, shuffled)
    assert not torch.equal(plain, reseeded)


def test_a_share_of_zero_holds_nothing_out(folder):
    module = TextDataModule(source=folder, seq_len=8, val_fraction=0, test_fraction=0)
    module.setup("fit")
    module.setup("test")
    assert module.val_dataloader() == []
    assert module.packed("train").num_documents == 40
    with pytest.raises(ValueError, match=r"got test_fraction=0 and no test_source. Pass one"):
        module.test_dataloader()


def _lossy_tokenizer(folder, words):
    vocab = {name: i for i, name in enumerate(["[UNK]", "[SEP]", *words])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


def test_a_tokenizer_that_loses_text_is_reported(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"ab cd ab {'cd ' * i}")
    tokenizer = _lossy_tokenizer(tmp_path, ["ab", "cd"])
    module = TextDataModule(source=str(tmp_path), pattern="*.txt", tokenizer=tokenizer, seq_len=8)
    assert module.vocab_size == 4
    with pytest.warns(UserWarning, match=r"stand for .* bytes by token_bytes, .* 1\.5"):
        module.setup("fit")
    packed = module.packed("val")
    bytes_per_token = packed.num_bytes / (packed.num_tokens - packed.num_documents)
    assert bytes_per_token == pytest.approx(3.0, rel=0.02)


def _stream(folder, *, val_source=None, batch_size=1, **config):
    return TextDataModule(
        source=folder,
        val_source=val_source,
        seq_len=8,
        batch_size=batch_size,
        val_fraction=0.3,
        test_fraction=0.2,
        streaming=StreamingConfig(**{"eval_tokens": 70, **config}),
    )


def test_a_stream_trains_on_the_documents_that_memory_would(folder):
    module = _stream(folder, batches_per_epoch=200, batch_size=2, shuffle_windows=7)
    module.setup("fit")
    loader = module.train_dataloader()
    assert len(loader) == 200
    tokens = {token for batch in loader for token in batch["tokens"].flatten().tolist()}
    in_memory = TextDataModule(source=folder, seq_len=8, val_fraction=0.3, test_fraction=0.2)
    assert tokens == set(in_memory.packed("train").tokens.tolist())
    for split in ("val", "test"):
        expected = in_memory.packed(split).tokens[:70].tolist()
        assert module.packed(split).tokens.tolist() == expected
    assert len(module.val_dataloader()) == 4
    assert module.summary is None
    with pytest.raises(ValueError, match=r"packed\('train'\) .* got streaming=True"):
        module.packed("train")


@pytest.mark.parametrize("name", ["batches_per_epoch", "shuffle_windows", "eval_tokens"])
def test_streaming_options_out_of_range_are_errors(name):
    with pytest.raises(ValueError, match=rf"{name} must be 1 or more, got 0\."):
        StreamingConfig(**{name: 0})


def test_a_stream_reads_own_sources_and_has_a_fingerprint(folder, tmp_path, caplog):
    val = _write(tmp_path / "val", count=3)
    module = _stream(folder, val_source=val, eval_tokens=10_000)
    with caplog.at_level("INFO"):
        module.setup("validate")
    assert _texts(module, "val") == [bytes([33 + i]) * 30 for i in range(3)]
    assert f"text from {folder!r}: streaming, files {module.fingerprint}" in caplog.text


MASKED = {"objective": "masked"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 0}, r"seq_len must be 1 or more, got 0\."),
        ({"batch_size": -2}, r"batch_size must be 1 or more, got -2\."),
        ({"seed": -1}, r"seed must be 0 or more, got -1\."),
        ({"num_workers": -1}, r"num_workers must be 0 or more, got -1\."),
        ({"val_fraction": -0.1}, r"val_fraction must be in \[0, 1\), got -0.1\."),
        ({"val_fraction": 0.6, "test_fraction": 0.4}, r"leave something .*, got 0.6 and 0.4\."),
        ({"mask_probability": 0.3}, r"is for objective='masked', got 0.3 and objective='causal'"),
        ({**MASKED, "mask_probability": 0.0}, r"mask_probability must lie in \(0, 1\], got 0.0"),
        ({**MASKED, "mask_probability": 1.5}, r"mask_probability must lie in \(0, 1\], got 1.5"),
        ({"streaming": True, "num_workers": 2}, r"num_workers must be 0 or 1 .*, got 2: a stream"),
        ({"streaming": True, "split": "tail"}, r"split='tail' needs .* memory, got streaming=True"),
    ],
)
def test_options_out_of_range_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        TextDataModule(**options)


def test_a_tokenizer_without_mask_is_an_error_for_masking(tmp_path):
    path = _lossy_tokenizer(tmp_path, ["ab"])
    with pytest.raises(ValueError, match=r"needs a mask token, and tokenizer='.*' has none"):
        TextDataModule(tokenizer=path, objective="masked")
    module = TextDataModule(tokenizer=path, objective="masked", mask_token="ab", eod_token="[SEP]")
    assert module.tokenizer.mask_id == 2


@pytest.mark.parametrize(
    ("stage", "split", "cure"),
    [
        (
            "fit",
            "train",
            "add text, lower val_fraction and test_fraction, or .* data.split tail",
        ),
        ("validate", "val", "raise val_fraction, pass val_source, or .* data.split tail"),
        ("test", "test", "raise test_fraction, pass test_source, or .* data.split tail"),
    ],
)
def test_a_corpus_too_small_for_the_context_is_an_error(folder, stage, split, cure):
    message = (
        rf"the {split} split must fill a window of 5,001 tokens \(seq_len=5000\), got [\d,]+ "
        rf"tokens in \d+ documents from source='{folder}'. Shorten seq_len, {cure}"
    )
    module = TextDataModule(source=folder, seq_len=5000, val_fraction=0.3, test_fraction=0.2)
    with pytest.raises(ValueError, match=message):
        module.setup(stage)


def test_an_empty_split_is_an_error(tmp_path):
    source = _write(tmp_path, count=1)
    module = TextDataModule(source=source, seq_len=8, val_fraction=1e-9, test_fraction=0)
    with pytest.raises(
        ValueError, match=r"the val split .* got 0 tokens in 0 documents .*data.split tail"
    ):
        module.setup("fit")


@pytest.mark.parametrize(
    "options",
    [{"split": "tail", "val_fraction": 0.999, "test_fraction": 0}, {"streaming": True}],
)
def test_a_split_that_is_of_no_help_is_not_advised(tmp_path, options):
    module = TextDataModule(source=_write(tmp_path, count=3), seq_len=5000, **options)
    with pytest.raises(ValueError, match=r"split must fill .* (?!.*data.split)"):
        module.setup("fit")


def test_a_batch_larger_than_the_corpus_is_an_error(folder):
    module = TextDataModule(source=folder, seq_len=8, batch_size=500)
    with pytest.raises(ValueError, match=r"batch_size=500 on 1 processes takes 500 windows"):
        module.train_dataloader()


def test_a_source_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match=r"source must exist, got 'no/such/folder'"):
        TextDataModule(source="no/such/folder").setup("fit")


def test_the_command_line_takes_every_kind_of_source():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TextDataModule, "data")
    for text, expected in (
        ("stdlib", "stdlib"),
        ("a/*.txt", "a/*.txt"),
        ("[a.txt, b.jsonl]", ["a.txt", "b.jsonl"]),
    ):
        config = parser.parse_args([f"--data.source={text}", "--data.val_source=null"])
        assert config.data.source == expected
        assert config.data.val_source is None
        assert TextDataModule(**config.data).source == expected
    with pytest.raises(jsonargparse.ArgumentError, match="split"):
        parser.parse_args(["--data.split=random"])


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], None),
        (["--data.streaming=true"], StreamingConfig()),
        (["--data.streaming={eval_tokens: 7}"], StreamingConfig(eval_tokens=7)),
        (["--data.streaming.shuffle_windows=3"], StreamingConfig(shuffle_windows=3)),
    ],
)
def test_the_command_line_takes_streaming_options(args, expected):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(TextDataModule, "data")
    config = parser.parse_args(["--data=TextDataModule", *args])
    assert parser.instantiate(config).data.streaming == expected
