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
    options = {"seq_len": SEQ_LEN, "seed": None, **options}
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
    for wrong, dtype, message in (
        (path, "uint16", r"tokens\.npy' with dtype='uint16'\. Leave it out"),
        (raw, None, r"tokens\.bin' with dtype=None\. Pass it"),
        (raw, "uint16", r"must be readable, got .*tokens\.bin"),
        (raw, "words", r"must be readable, got .*tokens\.bin.*words"),
        (tmp_path / "none.npy", None, r"must be readable, got .*none\.npy.*No such file"),
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


def test_an_empty_split_is_refused(corpus, tmp_path):
    with pytest.raises(ValueError, match=r"the test split must hold text, got none\. Raise"):
        write_token_files(folder=str(tmp_path), source=str(corpus), test_fraction=1e-9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.npy", "val.npy"]
