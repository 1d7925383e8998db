"""Reading a file in pieces."""

import pytest

from longnet_zoo.text.pieces import read_pieces


def test_long_files_are_cut_at_line_ends(tmp_path):
    text = "".join(f"zeile ä {i}\n" for i in range(100)).encode()
    path = tmp_path / "a.txt"
    path.write_bytes(text)
    pieces = list(read_pieces(path, max_bytes=64))
    assert b"".join(piece for _, piece in pieces) == text
    assert len(pieces) == -(-len(text) // 64)
    assert all(piece.endswith(b"\n") for _, piece in pieces)
    assert max(len(piece) for _, piece in pieces) < 64 + 16
    for start in (1, 7, len(pieces)):
        assert list(read_pieces(path, start=start, max_bytes=64)) == pieces[start:]
    assert list(read_pieces(path, max_bytes=len(text))) == [(0, text)]
    assert list(read_pieces(path, start=1)) == []


def test_files_without_lines_are_cut_between_characters(tmp_path):
    text = "\u20ac" * 50_000
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    pieces = [piece for _, piece in read_pieces(tmp_path / "a.txt", max_bytes=10_000)]
    assert len(pieces) == 15
    assert "".join(piece.decode() for piece in pieces) == text


def test_the_last_character_of_a_file_is_whole(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 9 + "\u20ac", encoding="utf-8")
    pieces = [piece for _, piece in read_pieces(tmp_path / "a.txt", max_bytes=10)]
    assert b"".join(pieces).decode() == "x" * 9 + "\u20ac"
    assert all(piece.decode() for piece in pieces if piece)


def test_pieces_have_a_size(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match="max_bytes must be 1 or more, got 0"):
        next(read_pieces(tmp_path / "a.txt", max_bytes=0))
