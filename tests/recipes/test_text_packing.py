import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longnet_zoo.tokenizers import ByteTokenizer
from recipes.text_packing import (
    Packer,
    collate,
    plan_epoch,
    read_window,
    window_size,
)

EOD, MASK = 256, 257
BYTES = ByteTokenizer()


def _pack(*texts):
    packer = Packer(BYTES)
    for text in texts:
        packer.add(text)
    return packer.finish()


def _plan(packed, *, seq_len=3, seed=0, epoch=0, shuffle_documents=False):
    return plan_epoch(
        packed, seq_len=seq_len, seed=seed, epoch=epoch, shuffle_documents=shuffle_documents
    )


def test_each_document_is_closed_by_its_end():
    packed = _pack(b"ab", b"c")
    assert packed.tokens.tolist() == [97, 98, EOD, 99, EOD]
    assert packed.tokens.dtype == np.uint16
    assert packed.starts.tolist() == [0, 3, 5]
    assert (packed.num_tokens, packed.num_documents, packed.num_bytes) == (5, 2, 3)


def test_no_document_gives_an_empty_stream():
    packed = _pack()
    assert (packed.num_tokens, packed.num_documents, packed.num_bytes) == (0, 0, 0)
    assert packed.tokens.dtype == np.uint16


def test_documents_are_encoded_in_groups(monkeypatch):
    monkeypatch.setattr("recipes.text_packing._GROUP_BYTES", 4)
    packer = Packer(BYTES)
    seen = []
    for text in (b"ab", b"cd", b"efghi", b"j"):
        packer.add(text)
        seen.append(packer.num_tokens)
    assert seen == [0, 6, 12, 12]
    assert packer.finish().tokens.tolist() == [*b"ab", EOD, *b"cd", EOD, *b"efghi", EOD, *b"j", EOD]


@pytest.mark.parametrize(
    ("start", "stop", "starts", "num_bytes"),
    [(0, 9, [0, 3, 5, 9], 6), (1, 4, [0, 2, 3], 2), (3, 5, [0, 2], 1), (6, 6, [0], 0)],
)
def test_a_part_keeps_its_documents(start, stop, starts, num_bytes):
    packed = _pack(b"ab", b"c", b"def")
    part = packed.part(start, stop, BYTES)
    assert part.tokens.tolist() == packed.tokens[start:stop].tolist()
    assert part.starts.tolist() == starts
    assert part.num_bytes == num_bytes


def test_a_plan_depends_on_seed_and_epoch_alone():
    packed = _pack(*[bytes([i]) * i for i in range(1, 40)])
    plans = {
        (seed, epoch): _plan(packed, seed=seed, epoch=epoch, shuffle_documents=True)
        for seed in (0, 5)
        for epoch in (0, 1)
    }
    again = _plan(packed, seed=5, epoch=1, shuffle_documents=True)
    assert again.windows.tolist() == plans[5, 1].windows.tolist()
    assert again.documents.tolist() == plans[5, 1].documents.tolist()
    assert again.offset == plans[5, 1].offset
    assert len({tuple(plan.windows) for plan in plans.values()}) == 4
    assert len({tuple(plan.documents) for plan in plans.values()}) == 4


def test_offsets_reach_every_place_of_a_window():
    packed = _pack(b"abcdefghijk")
    offsets = {_plan(packed, seq_len=5, epoch=epoch).offset for epoch in range(100)}
    assert offsets == set(range(5))


@given(
    lengths=st.lists(st.integers(1, 13), min_size=1, max_size=9),
    seq_len=st.integers(1, 11),
    epoch=st.integers(0, 3),
    shuffle=st.booleans(),
)
def test_an_epoch_visits_almost_every_token_once(lengths, seq_len, epoch, shuffle):
    packed = _pack(*[bytes([i + 1]) * length for i, length in enumerate(lengths)])
    if packed.num_tokens < seq_len + 1:
        return
    plan = _plan(packed, seq_len=seq_len, epoch=epoch, shuffle_documents=shuffle)
    order = plan.documents if shuffle else range(packed.num_documents)
    stream = [t for i in order for t in packed.tokens[packed.starts[i] : packed.starts[i + 1]]]
    ring = np.roll(stream, -plan.offset)
    assert sorted(plan.windows) == list(range(packed.num_tokens // seq_len))
    for place in plan.windows:
        start = plan.offset + int(place) * seq_len
        window = read_window(packed, plan, start, seq_len + 1)
        assert window.tolist() == np.roll(ring, -place * seq_len)[: seq_len + 1].tolist()


def test_causal_labels_are_the_next_tokens():
    windows = np.array([[1, 2, EOD, 3], [4, EOD, 5, 6]], np.uint16)
    batch = collate(windows, tokenizer=BYTES, objective="causal")
    assert batch["tokens"].tolist() == [[1, 2, EOD], [4, EOD, 5]]
    assert batch["labels"].tolist() == [[2, EOD, 3], [EOD, 5, 6]]
    assert set(batch) == {"tokens", "labels"}
    assert {part.dtype for part in batch.values()} == {torch.int64}
    assert window_size(3, "causal") == 4


def test_confined_batches_are_one_row_with_boundaries():
    windows = np.array([[1, 2, EOD, 3], [4, EOD, 5, 6], [7, 8, 9, EOD]], np.uint16)
    batch = collate(windows, tokenizer=BYTES, objective="causal", confine_to_document=True)
    assert batch["tokens"].tolist() == [[1, 2, EOD, 4, EOD, 5, 7, 8, 9]]
    assert batch["labels"].tolist() == [[2, EOD, -100, EOD, -100, 6, 8, 9, EOD]]
    # An end of document at the end of a row makes no empty sequence.
    assert batch["cu_seqlens"].tolist() == [0, 3, 5, 6, 9]
    assert batch["cu_seqlens"].dtype == torch.int32


def _masked(windows, *, seed=0, probability=0.15, **options):
    return collate(
        windows,
        tokenizer=BYTES,
        objective="masked",
        mask_probability=probability,
        mask_seeds=[(seed, row) for row in range(len(windows))],
        **options,
    )


def test_masking_follows_bert():
    rng = np.random.default_rng(0)
    windows = rng.integers(0, 256, (4, 50_000)).astype(np.uint16)
    windows[rng.random(windows.shape) < 0.1] = EOD
    batch = _masked(windows)
    tokens, labels = batch["tokens"].numpy(), batch["labels"].numpy()
    chosen = labels >= 0
    assert window_size(7, "masked") == 7
    assert (labels[chosen] == windows[chosen]).all()
    assert (tokens[~chosen] == windows[~chosen]).all()
    assert not (windows[chosen] == EOD).any()
    assert chosen.mean() == pytest.approx(0.15 * 0.9, abs=0.003)
    assert (tokens[chosen] == MASK).mean() == pytest.approx(0.8, abs=0.01)
    same = tokens[chosen] == windows[chosen]
    assert same.mean() == pytest.approx(0.1, abs=0.01)
    others = tokens[chosen][(tokens[chosen] != MASK) & ~same]
    assert len(others) / chosen.sum() == pytest.approx(0.1, abs=0.01)
    assert set(others.tolist()) == set(range(256))


def test_masks_depend_on_their_seeds_alone():
    windows = np.tile(np.arange(100, dtype=np.uint16), (2, 1))
    first, again, other = _masked(windows), _masked(windows), _masked(windows, seed=1)
    assert torch.equal(first["tokens"], again["tokens"])
    assert not torch.equal(first["tokens"], other["tokens"])
    assert not torch.equal(first["labels"][0], first["labels"][1])


def test_every_row_with_text_has_a_label():
    windows = np.array([[EOD, 5, EOD], [EOD, EOD, EOD]], np.uint16)
    labels = _masked(windows, probability=1e-9)["labels"]
    assert labels.tolist() == [[-100, 5, -100], [-100, -100, -100]]


def test_confined_masks_keep_the_boundaries():
    windows = np.array([[1, 2, EOD, 3], [4, EOD, 5, 6]], np.uint16)
    batch = _masked(windows, probability=1.0, confine_to_document=True)
    assert batch["cu_seqlens"].tolist() == [0, 3, 4, 6, 8]
    assert batch["labels"].tolist() == [[1, 2, -100, 3, 4, -100, 5, 6]]
