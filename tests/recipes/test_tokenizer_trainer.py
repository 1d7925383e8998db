"""A tokenizer of one's own: it knows frequent words and reads back what it wrote."""

from pathlib import Path

import pytest

from longnet_zoo.tokenizers import load_tokenizer
from recipes.tokenizer_trainer import main, train_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("segment dilation segment rate dilation segment\n" * 50)
    return str(path)


def train(words, output, **options):
    options = {"vocab_size": 270, "val_fraction": 0.0, "test_fraction": 0.0, **options}
    return train_tokenizer(output=str(output), source=words, **options)


def test_frequent_words_become_few_tokens_and_come_back(words, tmp_path):
    output = tmp_path / "new folder" / "tokenizer.json"
    assert train(words, output, vocab_size=290) == 277  # three words have no more parts
    made, plain = load_tokenizer(str(output)), load_tokenizer("bytes")
    assert made.pad_id == 2
    text = "segment dilation ü"
    (ids,) = made.encode_batch([text.encode()])
    assert len(ids) < len(plain.encode_batch([text.encode()])[0]) / 2
    assert made.decode(ids.tolist()).strip() == text


def test_the_same_text_gives_the_same_file(words, tmp_path):
    train(words, tmp_path / "a.json")
    train(words, tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_the_tokenizer_of_the_icons_reads_names_in_few_tokens():
    made = load_tokenizer(str(ROOT / "recipes" / "assets" / "icons" / "tokenizer.json"))
    names = [b"red arrow left bold circle outline", b"battery charging"]
    assert made.vocab_size == 2048
    for name, ids in zip(names, made.encode_batch(names), strict=True):
        assert len(ids) <= 6
        assert made.decode(ids.tolist()).strip() == name.decode()


def test_command_line(words, tmp_path, capsys):
    options = ["--val_fraction=0", "--test_fraction=0", "--vocab_size=270"]
    main([f"--source={words}", f"--output={tmp_path / 'x.json'}", *options])
    assert "270 token ids" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([f"--source={words}", "--output=x.txt", *options])
    assert "must end in .json, got 'x.txt'" in capsys.readouterr().err


def test_bad_options_are_refused(words, tmp_path):
    with pytest.raises(ValueError, match=r"vocab_size must be at least 259.*got 100"):
        train(words, tmp_path / "x.json", vocab_size=100)
    with pytest.raises(ValueError, match=r"output must be a file that can be written.*words\.txt"):
        train(words, Path(words, "x.json"))
    single = tmp_path / "single.txt"
    single.write_text("a")
    with pytest.raises(ValueError, match="must hold text that repeats itself, got none"):
        train(str(single), tmp_path / "x.json")
