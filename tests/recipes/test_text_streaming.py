import functools
import itertools
import json

import pytest

from longnet_zoo.tokenizers import ByteTokenizer
from recipes.text_corpus import read_documents
from recipes.text_files import find_files
from recipes.text_packing import collate
from recipes.text_streaming import StreamingWindows, StreamLoader, StreamPosition

SEQ_LEN = 5
BYTES = ByteTokenizer()


@pytest.fixture
def files(tmp_path):
    for i in range(3):
        lines = [json.dumps({"text": chr(97 + i) * (3 + 7 * j % 11)}) for j in range(6)]
        (tmp_path / f"{i}.jsonl").write_text("\n".join(lines))
    (tmp_path / "z.txt").write_text("a whole file")
    return find_files(str(tmp_path))


def _dataset(files, *, seq_len=SEQ_LEN, objective="causal", is_train=lambda key: True, **options):
    options = {"batch_size": 2, "block_size": 3, "seed": 1, "read_options": {}} | options
    return StreamingWindows(
        files,
        is_train=is_train,
        tokenizer=BYTES,
        collate=functools.partial(collate, tokenizer=BYTES, objective=objective),
        seq_len=seq_len,
        window_size=seq_len + (objective == "causal"),
        **options,
    )


def _loader(files, *, num_batches=4, num_workers=0, corpus="", **options):
    return StreamLoader(
        _dataset(files, **options),
        num_batches=num_batches,
        num_workers=num_workers,
        corpus=corpus,
    )


def _rows(loader):
    return [batch["tokens"].tolist() for batch in loader]


def _stream(files, keep=lambda key: True):
    return [t for d in read_documents(files) if keep(d.key) for t in [*d.text, BYTES.eod_id]]


@pytest.mark.parametrize("objective", ["causal", "masked"])
@pytest.mark.parametrize("seq_len", [5, 7])
def test_a_stream_holds_every_token_in_order(files, objective, seq_len):
    expected = _stream(files) * 3
    blocks = iter(_dataset(files, objective=objective, seq_len=seq_len)._blocks())
    found = []
    while len(found) < 2 * len(expected) // 3:
        start, end, windows = next(blocks)
        assert end.block == start.block + 1
        if objective == "causal":
            assert windows[:-1, -1].tolist() == windows[1:, 0].tolist()
        found += windows[:, :seq_len].flatten().tolist()
    assert found == expected[: len(found)]


def test_blocks_are_shuffled_by_seed(files):
    first = _rows(_loader(files))
    assert first == _rows(_loader(files))
    other = _rows(_loader(files, seed=2))
    assert first != other
    # Two batches of two windows are a block.
    assert sorted(first[0] + first[1]) == sorted(other[0] + other[1])


def test_epochs_go_on_in_the_stream(files):
    loader = _loader(files, num_batches=3)
    assert len(loader) == 3
    assert _rows(loader) + _rows(loader) == _rows(_loader(files, num_batches=6))


@pytest.mark.parametrize("taken", [0, 1, 2, 3, 19, 20, 40])
@pytest.mark.parametrize("options", [{}, {"num_workers": 1, "shuffle_files": True}])
def test_a_position_is_resumed(files, taken, options):
    expected = _rows(_loader(files, num_batches=48, **options))
    loader = _loader(files, num_batches=48, **options)
    _rows(itertools.islice(loader, taken))
    state = loader.state_dict()
    # Taken after the state, so not counted.
    next(iter(loader))
    resumed = _loader(files, num_batches=48 - taken, **options)
    resumed.load_state_dict(state)
    assert _rows(resumed) == expected[taken:]
    assert json.loads(json.dumps(state)) == state


def test_ranks_share_the_batches_of_one_process(files):
    whole = _rows(_loader(files, batch_size=4, block_size=4))
    ranks = [
        _rows(_loader(files, batch_size=2, block_size=4, rank=rank, world_size=2))
        for rank in (0, 1)
    ]
    assert [first + second for first, second in zip(*ranks, strict=True)] == whole


@pytest.mark.parametrize("taken", [0, 7, 20, 31])
def test_a_long_file_is_streamed_in_pieces_and_resumed(tmp_path, taken):
    lines = [f"line {i}\n".encode() for i in range(40)]
    (tmp_path / "a.txt").write_bytes(b"".join(lines))
    found = find_files(str(tmp_path))
    options = {"read_options": {"max_document_bytes": 50}}
    expected = _rows(_loader(found, num_batches=48, **options))
    # Every 56 tokens or so a piece ends.
    num_ends = sum(row.count(BYTES.eod_id) for batch in expected for row in batch)
    assert num_ends == pytest.approx(48 * 2 * SEQ_LEN / 56, abs=3)
    loader = _loader(found, num_batches=48, **options)
    _rows(itertools.islice(loader, taken))
    resumed = _loader(found, num_batches=48 - taken, **options)
    resumed.load_state_dict(loader.state_dict())
    assert _rows(resumed) == expected[taken:]


def test_held_out_documents_are_left_out(files):
    def keep(key):
        return not key.startswith("1.jsonl")

    rows = _rows(_loader(files, is_train=keep, num_batches=50))
    tokens = {token for batch in rows for row in batch for token in row}
    assert ord("b") not in tokens
    assert {ord("a"), ord("c"), BYTES.eod_id} <= tokens


def test_files_are_shuffled_each_pass(files):
    def order(shuffle, corpus_pass):
        pieces = _dataset(files, shuffle_files=shuffle)._one_pass(corpus_pass, (0, 0))
        return [tuple(piece.tokens[:-1]) for piece in pieces]

    assert order(False, 0) == order(False, 1)
    assert len({tuple(order(True, corpus_pass)) for corpus_pass in range(6)}) > 2
    assert sorted(order(True, 3)) == sorted(order(False, 0))


def test_documents_are_tokenized_in_groups(files, monkeypatch):
    expected = _rows(_loader(files, num_batches=20))
    monkeypatch.setattr("recipes.text_packing._GROUP_BYTES", 9)
    assert _rows(_loader(files, num_batches=20)) == expected


def test_a_corpus_shorter_than_a_window_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("1234")
    files = find_files(str(tmp_path))
    message = r"a window of 6 tokens, got 5 tokens in 1 files. Shorten seq_len"
    with pytest.raises(ValueError, match=message):
        next(iter(_loader(files)))
    with pytest.raises(ValueError, match="got 0 tokens in 1 files"):
        next(iter(_loader(files, is_train=lambda key: False)))
    resumed = _dataset(files, is_train=lambda key: False)
    resumed.position = StreamPosition(file=1)
    with pytest.raises(ValueError, match="got 0 tokens in 1 files"):
        next(iter(resumed))


def test_data_in_another_order_is_reported(files):
    state = _loader(files, corpus="one").state_dict()
    with pytest.warns(UserWarning, match="corpus 'one' -> 'two', .*seed 1 -> 3"):
        _loader(files, corpus="two", seed=3).load_state_dict(state)
