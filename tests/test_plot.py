import re
import sys

import numpy as np
import pytest

from longnet_zoo.ops.pattern import DilatedPattern
from longnet_zoo.plot import plot_pattern

PATTERN = DilatedPattern(segment_lengths=(5, 12, 20), dilation_rates=(1, 2, 3))
UNSEEN, FUTURE = (0xF0, 0xEF, 0xEC), (0xFF, 0xFF, 0xFF)


def panels(figure):
    return [axes for axes in figure.axes if axes.images]


def pixels(figure):
    """Colours of every drawn head as bytes, (heads, n, n, 3)."""
    images = [np.asarray(axes.images[0].get_array()) for axes in panels(figure)]
    return np.round(255 * np.stack(images)).astype(int)


def words(figure):
    return [text.get_text() for text in figure.texts]


def reached_by(pattern, seq_len, head, i, j):
    """Branches by which query i sees key j, from the definition."""
    branches = []
    for number, (length, rate) in enumerate(pattern.branches):
        length = min(length, seq_len)
        is_same_segment = i // length == j // length
        offset = head % rate
        if is_same_segment and i % length % rate == offset == j % length % rate:
            branches.append(number)
    return tuple(branches)


@pytest.mark.parametrize("is_causal", [False, True])
def test_every_cell_shows_the_shortest_branch_and_the_number_of_branches(is_causal):
    image = pixels(plot_pattern(PATTERN, seq_len=23, num_heads=4, is_causal=is_causal))
    assert image.shape == (4, 23, 23, 3)
    colors = {}
    for head in range(4):
        for i in range(23):
            for j in range(23):
                branches = reached_by(PATTERN, 23, head, i, j)
                meaning = (branches[0], len(branches)) if branches else "unseen"
                if is_causal and j > i:
                    meaning = "future"
                colors.setdefault(meaning, set()).add(tuple(image[head, i, j]))
    # One colour for each meaning, one meaning for each colour.
    assert all(len(found) == 1 for found in colors.values())
    assert len(set.union(*colors.values())) == len(colors)
    assert colors["unseen"] == {UNSEEN}
    assert colors.get("future", {FUTURE}) == {FUTURE}
    assert {(0, 1), (0, 2), (0, 3), (1, 1), (2, 1)} <= colors.keys()
    brightness = [sum(next(iter(colors[0, count]))) for count in (1, 2, 3)]
    assert brightness[0] > brightness[1] > brightness[2]


def test_block_offsets_are_drawn_too():
    block = DilatedPattern(segment_lengths=(8,), dilation_rates=(2,), head_offset="block")
    image = pixels(plot_pattern(block, seq_len=8, num_heads=4))
    starts = [int((head[0, 0] == UNSEEN).all()) for head in image]
    assert starts == [0, 0, 1, 1]


def test_more_work_than_dense_attention_is_no_power_of_ten():
    twice = DilatedPattern(segment_lengths=(4, 8), dilation_rates=(1, 1))
    facts = "bidirectional, 8 tokens, 150 % of dense work"
    assert facts in words(plot_pattern(twice, seq_len=8, num_heads=1))


def test_words_name_branches_length_and_share():
    figure = plot_pattern(PATTERN, seq_len=23, num_heads=4, is_causal=True, title="My pattern")
    found = words(figure)
    assert "My pattern" in found
    assert [f"segment {w}, rate {r}" in found for w, r in PATTERN.branches] == [True] * 3
    assert "darker: reached by 2 or 3 branches, and counted as often" in found
    (facts,) = [text for text in found if "tokens" in text]
    share = PATTERN.attended_pairs(23, 4, is_causal=True) / (4 * 23 * 24 / 2)
    assert facts == f"causal, 23 tokens, {100 * share:.0f} % of dense work"
    assert [axes.get_title() for axes in panels(figure)] == [f"head {i}" for i in range(4)]


def test_one_branch_needs_no_words_about_shades():
    one = DilatedPattern(segment_lengths=(5,), dilation_rates=(1,))
    assert not any("darker" in text for text in words(plot_pattern(one, seq_len=9, num_heads=1)))
    many = DilatedPattern.geometric(4, 64)
    assert any(
        "by 2 to 5 branches" in x for x in words(plot_pattern(many, seq_len=64, num_heads=1))
    )


def test_chosen_heads_are_drawn_in_order():
    figure = plot_pattern(PATTERN, seq_len=23, num_heads=40, heads=[7, 0])
    assert [axes.get_title() for axes in panels(figure)] == ["head 7", "head 0"]
    every = pixels(plot_pattern(PATTERN, seq_len=23, num_heads=8))
    assert (pixels(figure) == every[[7, 0]]).all()


def test_long_sequences_are_drawn_to_scale():
    long = DilatedPattern(segment_lengths=(2048, 32768), dilation_rates=(1, 12))
    figure = plot_pattern(long, seq_len=32768, num_heads=2, is_causal=True)
    small = DilatedPattern(segment_lengths=(8, 128), dilation_rates=(1, 12))
    expected = plot_pattern(small, seq_len=128, num_heads=2, is_causal=True)
    assert (pixels(figure) == pixels(expected)).all()
    # Words are those of the pattern that was asked for.
    assert "segment 32,768, rate 12" in words(figure)
    (facts,) = [text for text in words(figure) if "tokens" in text]
    assert re.search(r"32,768 tokens, .* drawn at 1 : 256$", facts)
    assert pixels(plot_pattern(long, seq_len=256, num_heads=1)).shape == (1, 256, 256, 3)


@pytest.mark.parametrize("num_heads", [1, 2, 3, 5, 8, 12, 16])
@pytest.mark.parametrize("seq_len", [1, 2, 20, 97, 256])
def test_panels_lie_inside_the_figure_and_apart(num_heads, seq_len):
    figure = plot_pattern(PATTERN, seq_len=seq_len, num_heads=num_heads)
    boxes = [axes.get_position() for axes in panels(figure)]
    assert len(boxes) == num_heads
    for box in boxes:
        assert 0 < box.x0 < box.x1 < 1
        assert 0 < box.y0 < box.y1 < 1
    for place, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[place + 1 :])
    # Cells are whole pixels at the resolution the command line writes.
    width = boxes[0].width * figure.get_figwidth() * 160 / seq_len
    assert width == pytest.approx(round(width), abs=1e-6)
    assert width >= 2


def test_words_stay_inside_the_picture():
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for num_heads in (1, 4):
        figure = plot_pattern(
            DilatedPattern.geometric(2048, 32768), seq_len=64, num_heads=num_heads
        )
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        for text in figure.texts:
            box = text.get_window_extent(canvas.get_renderer())
            assert box.x0 >= 0
            assert box.x1 <= figure.bbox.width
            assert 0 <= box.y0 <= box.y1 <= figure.bbox.height


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 0}, "seq_len must be an integer of at least 1, got 0"),
        ({"seq_len": 8.0}, "seq_len must be an integer of at least 1, got 8.0"),
        ({"num_heads": 0}, "num_heads must be an integer of at least 1, got 0"),
        ({"num_heads": 17}, r"1 to 16 heads between 0 and 16, got \(0, 1, .*Pass for example"),
        ({"heads": []}, r"heads must name 1 to 16 heads between 0 and 3, got \(\)"),
        ({"heads": [0, 4]}, r"between 0 and 3, got \(0, 4\)"),
        ({"heads": [-1]}, r"got \(-1,\)"),
        ({"seq_len": 100_000}, r"seq_len=100000 is too long .*\(5, 12, 20\): drawn at 1 : 1024"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plot_pattern(PATTERN, **{"seq_len": 23, "num_heads": 4, **options})


def test_missing_matplotlib_is_named_with_the_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RuntimeError, match=r"Install it: pip install matplotlib"):
        plot_pattern(PATTERN, seq_len=23, num_heads=4)


@pytest.mark.parametrize("is_causal", [True, False])
def test_words_end_inside_a_narrow_picture(is_causal):
    pattern = DilatedPattern(segment_lengths=(2**16, 2**20), dilation_rates=(1, 16))
    figure = plot_pattern(pattern, seq_len=2**20, num_heads=1, is_causal=is_causal, title="x")
    figure.canvas.draw()
    for text in figure.texts:
        assert text.get_window_extent().x1 <= figure.bbox.x1
