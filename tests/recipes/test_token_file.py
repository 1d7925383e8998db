"""Token files: what is written, which tokens each process reads, and that a run resumes exactly."""

import itertools

import numpy as np
import pytest
import torch

from recipes import token_file_writer
from recipes.loader import FILLER
from recipes.text_data import TextDataModule
from recipes.token_file import TokenFileDataModule, TokenWindows, open_tokens
from recipes.token_file_writer import write_token_files

NUM_TOKENS = 101
SEQ_LEN = 24


class Guarded(np.ndarray):
    """Tokens that remember which were read."""

    def __getitem__(self, places):
        self.read.update(np.arange(len(self))[places].tolist())
        return np.asarray(self)[places]


@pytest.fixture
def tokens():
    guarded = np.arange(NUM_TOKENS, dtype=np.uint16).view(Guarded)
    guarded.read = set()
    return guarded


@pytest.fixture
def path(tmp_path):
    np.save(tmp_path / "tokens.npy", np.arange(NUM_TOKENS, dtype=np.uint16))
    return str(tmp_path / "tokens.npy")


def windows(tokens, rank, size, **options):
    options = {"vocab_size": NUM_TOKENS, "seq_len": SEQ_LEN, "seed": None, **options}
    return TokenWindows(tokens, sequence_rank=rank, sequence_size=size, **options)


def test_a_process_reads_its_part_and_one_token_more(tokens):
    batch = windows(tokens, 2, 3)[[1]]
    assert batch["tokens"].tolist() == [list(range(24 + 16, 24 + 24))]
    assert batch["labels"].tolist() == [list(range(24 + 17, 24 + 25))]
    assert (batch["tokens"].dtype, batch["is_part"]) == (torch.int64, True)
    assert tokens.read == set(range(24 + 16, 24 + 25))


@pytest.mark.parametrize("layout", ["contiguous", "striped", "zigzag"])
def test_parts_together_are_the_window(tokens, layout):
    whole = windows(tokens, 0, 1, seed=7)[3, 1, 2]
    parts = [windows(tokens, rank, 4, seed=7, layout=layout)[3, 1, 2] for rank in range(4)]
    assert "is_part" not in whole
    for name in ("tokens", "labels"):
        joined = torch.cat([part[name] for part in parts], dim=1)
        assert joined.sort(dim=1).values.equal(whole[name])
    assert all(part["labels"].equal(part["tokens"] + 1) for part in parts)


def test_epochs_have_other_orders_and_offsets(tokens):
    data = windows(tokens, 0, 1, seed=0)
    starts = [
        [int(data[epoch, place, 1]["tokens"][0, 0]) for place in range(4)] for epoch in (0, 1)
    ]
    assert all(len({start % SEQ_LEN for start in epoch}) == 1 for epoch in starts)
    assert starts[0][0] % SEQ_LEN != starts[1][0] % SEQ_LEN
    assert max(map(max, starts)) + SEQ_LEN < NUM_TOKENS


def test_a_filler_has_no_labels(tokens):
    labels = windows(tokens, 0, 1)[[0, FILLER]]["labels"]
    assert (labels[0] >= 0).all()
    assert (labels[1] == -100).all()


@pytest.mark.parametrize(
    ("size", "layout", "message"),
    [
        (5, "contiguous", "multiple of 5 .*got seq_len=24. Set data.seq_len to 20 or 25"),
        (8, "zigzag", "multiple of 16 .*layout='zigzag', got seq_len=24.* to 16 or 32"),
        (32, "striped", "multiple of 32 .* to 32"),
    ],
)
def test_a_window_that_does_not_split_evenly_is_refused(tokens, size, layout, message):
    with pytest.raises(ValueError, match=message):
        windows(tokens, 0, size, layout=layout)


def test_training_resumes_exactly(path):
    def make():
        return TokenFileDataModule(train=path, seq_len=7, batch_size=3).train_dataloader()

    def batches(loader, count):
        endless = itertools.chain.from_iterable(itertools.repeat(loader))
        return [batch["tokens"].tolist() for batch in itertools.islice(endless, count)]

    whole, first, second = batches(make(), 11), make(), make()
    assert batches(first, 6) == whole[:6]
    second.load_state_dict(first.state_dict())
    assert batches(second, 5) == whole[6:]


@pytest.mark.parametrize("is_other", [False, True])
def test_resuming_with_another_file_of_this_length_warns(path, recwarn, is_other):
    module = TokenFileDataModule(train=path, seq_len=7, batch_size=3)
    state = module.train_dataloader().state_dict()
    if is_other:
        np.save(path, np.arange(NUM_TOKENS, dtype=np.uint16)[::-1])
    again = TokenFileDataModule(train=path, seq_len=7, batch_size=3)
    again.train_dataloader().load_state_dict(state)
    said = [str(warning.message) for warning in recwarn]
    assert ["data in another order: content '" in message for message in said] == [True] * is_other


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (30, 259, r"vocab_size=259, got ids from 0 to 259 in '.*tokens\.npy'\. Set data\.tok"),
        # The last label.
        (100, 300, r"got ids from 0 to 300 in"),
        (30, -1, r"got ids from -1 to 100 in"),
    ],
)
def test_ids_that_the_tokenizer_does_not_have_are_refused(path, place, wrong, message):
    ids = np.arange(NUM_TOKENS, dtype=np.int32)
    ids[place] = wrong
    np.save(path, ids)
    data = TokenFileDataModule(train=path, val=path, seq_len=NUM_TOKENS - 1)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        with pytest.raises(ValueError, match=message):
            next(iter(loader))


def test_held_out_windows_come_once(path):
    module = TokenFileDataModule(train=path, val=path, test=path, seq_len=10, batch_size=3)
    for loader in (module.val_dataloader(), module.test_dataloader()):
        tokens = torch.cat([batch["tokens"].flatten() for batch in loader])
        assert tokens.sort().values.tolist() == list(range(100))
    assert TokenFileDataModule(train=path, seq_len=10).val_dataloader() == []


def test_a_test_needs_tokens(path):
    with pytest.raises(ValueError, match="got test=None"):
        TokenFileDataModule(train=path, seq_len=10).test_dataloader()


@pytest.mark.parametrize("name", ["seq_len", "batch_size"])
def test_sizes_are_positive(path, name):
    with pytest.raises(ValueError, match=f"{name} must be 1 or more, got 0"):
        TokenFileDataModule(train=path, **{name: 0})


def test_a_raw_file_is_read_by_its_dtype(tmp_path):
    path = tmp_path / "tokens.bin"
    np.arange(9, dtype=np.int32).tofile(path)
    assert open_tokens(path, dtype="int32", seq_len=8).tolist() == list(range(9))


def test_a_file_that_is_none_is_refused(tmp_path, path):
    raw = tmp_path / "tokens.bin"
    raw.write_bytes(b"12345")
    np.save(tmp_path / "floats.npy", np.zeros((2, 3)))
    (tmp_path / "empty.npy").touch()
    for wrong, dtype, message in (
        (path, "uint16", r"tokens\.npy' with dtype='uint16'\. Leave it out"),
        (raw, None, r"tokens\.bin' with dtype=None\. Pass it"),
        (raw, "uint16", r"must be readable, got .*tokens\.bin"),
        (raw, "words", r"must be readable, got .*tokens\.bin.*words"),
        (tmp_path / "none.npy", None, r"must be readable, got .*none\.npy.*No such file"),
        (tmp_path / "empty.npy", None, r"must be readable, got .*empty\.npy"),
        (tmp_path / "floats.npy", None, r"got float64 of shape \(2, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            open_tokens(wrong, dtype=dtype, seq_len=1)
    with pytest.raises(ValueError, match=r"more than seq_len=101 tokens, got 101"):
        open_tokens(path, dtype=None, seq_len=101)


def test_written_tokens_are_those_of_the_text_recipe(corpus, tmp_path, capsys):
    token_file_writer.main([f"--folder={tmp_path}", f"--source={corpus}"])
    said = capsys.readouterr().out
    data = TextDataModule(source=str(corpus), seq_len=16)
    for split in ("train", "val", "test"):
        expected = data.packed(split).tokens
        tokens = np.load(tmp_path / f"{split}.npy", mmap_mode="r")
        assert tokens.dtype == expected.dtype
        assert np.array_equal(tokens, expected)
        assert f"{split}.npy: {len(expected):,} tokens" in said
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "nowhere"}, "nowhere"),
        ({"folder": "{here}/taken/tokens"}, "folder must be one that can be made, got '{here}/tak"),
    ],
)
def test_the_writer_refuses_in_one_line(corpus, tmp_path, capsys, options, message):
    (tmp_path / "taken").touch()
    options = {"source": str(corpus), "folder": "{here}/tokens", **options}
    args = [f"--{name}={value.format(here=tmp_path)}" for name, value in options.items()]
    with pytest.raises(SystemExit) as stop:
        token_file_writer.main(args)
    said = capsys.readouterr().err
    assert (stop.value.code, said.count("\n")) == (2, 1)
    assert message.format(here=tmp_path) in said


def test_an_empty_split_is_refused(corpus, tmp_path):
    with pytest.raises(ValueError, match=r"the test split must hold text, got none\. Raise"):
        write_token_files(folder=str(tmp_path), source=str(corpus), test_fraction=1e-9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.npy", "val.npy"]
