import pytest
import torch
from matplotlib.colors import to_hex

from recipes.image_text_figures import ShownPair, find_pairs, retrieval_figure


def pair(caption, *, side=8):
    return ShownPair(name=caption, caption=caption, pixels=torch.rand(side, side, 3))


def batches(read):
    """Yields two batches of three pairs, and notes that it was asked."""
    for start in (0, 3):
        read.append(start)
        yield {
            "images": torch.full((3, 3, 4, 4), float(start)),
            "image_ids": torch.arange(start, start + 3),
            "text_ids": torch.arange(start, start + 3) * 10,
            "names": [f"name {number}" for number in range(start, start + 3)],
            "captions": [f"caption {number}" for number in range(start, start + 3)],
        }


def to_pixels(images):
    return images.permute(0, 2, 3, 1) / 10


def test_pairs_are_found_by_their_ids_and_no_more_is_read():
    read = []
    found = find_pairs(batches(read), {(1, 10), (2, 20), (2, 99)}, pixels=to_pixels)
    assert read == [0, 3]
    assert {key: shown.caption for key, shown in found.items()} == {
        (1, 10): "caption 1",
        (2, 20): "caption 2",
    }
    read.clear()
    found = find_pairs(batches(read), [(1, 10)], pixels=to_pixels)
    assert read == [0]
    assert found[1, 10].pixels.shape == (4, 4, 3)
    later = find_pairs(batches(read), [(4, 40)], pixels=to_pixels)
    assert later[4, 40].pixels.unique().tolist() == pytest.approx([0.3])


def test_large_images_are_thinned_out():
    batch = {
        "images": torch.rand(1, 3, 600, 300),
        "image_ids": torch.tensor([1]),
        "text_ids": torch.tensor([1]),
        "names": [""],
        "captions": [""],
    }
    found = find_pairs([batch], [(1, 1)], pixels=to_pixels)
    assert found[1, 1].pixels.shape == (200, 100, 3)


def test_figure_has_a_row_for_each_sentence_and_frames_what_is_right():
    rows = [[pair(f"{row}{column}") for column in range(3)] for row in range(2)]
    marks = [[False, True, False], [False, False, False]]
    figure = retrieval_figure(["one sentence", "word " * 40], rows, is_right=marks)
    axes = figure.get_axes()
    assert [one.get_xlabel() for one in axes] == ["00", "01", "02", "10", "11", "12"]
    frames = [one.spines["left"].get_linewidth() for one in axes]
    assert [width == max(frames) for width in frames] == [False, True, *[False] * 4]
    assert len({to_hex(one.spines["left"].get_edgecolor()) for one in axes}) == 2
    tops = [one.get_position().y0 for one in axes]
    assert tops[0] == tops[2] > tops[3]
    texts = [text.get_text() for text in figure.texts]
    assert "one sentence" in texts
    assert any(text.startswith("word word") and text.endswith("…") for text in texts)
    assert any("in 1 of 2 rows" in text for text in texts)
    for shown, one in zip(rows[0], axes, strict=False):
        assert one.images[0].get_array().shape == tuple(shown.pixels.shape)


def test_heading_and_note_keep_apart_where_few_images_are_searched():
    figure = retrieval_figure(["a"], [[pair("b")]], is_right=[[True]])
    heading, note = (text.get_window_extent() for text in figure.texts[:2])
    assert heading.x1 < note.x0


def test_nothing_is_framed_where_nobody_knows_what_is_right():
    figure = retrieval_figure(["a"], [[pair("b"), pair("c")]])
    assert not any("green" in text.get_text() for text in figure.texts)
    assert len({one.spines["left"].get_linewidth() for one in figure.get_axes()}) == 1
