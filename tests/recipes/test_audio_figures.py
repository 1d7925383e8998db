import dataclasses

import pytest
import torch
from matplotlib.colors import to_hex

from recipes.audio_figures import ClipExample, TagExample, clips_figure, tags_figure

CLIP = ClipExample(
    log_mel=torch.randn(30, 16),
    seconds=0.3,
    name="a/drum_1.ogg",
    true="drum",
    predicted="drum",
    probability=0.87,
)


def test_clips_show_class_prediction_and_probability():
    wrong = dataclasses.replace(CLIP, predicted="bass", probability=0.4, true="alarm")
    figure = clips_figure([CLIP, wrong, CLIP, CLIP, CLIP], title="Held out")
    shown = [axes for axes in figure.axes if axes.get_visible()]
    titles = [axes.get_title(loc="left") for axes in shown]
    assert titles == ["bass 40%, is alarm", *["drum 87%"] * 4]
    assert [text.get_text() for text in shown[1].texts] == ["drum_1"]
    (image,) = shown[1].images
    assert image.get_array().shape == (16, 30)
    assert list(image.get_extent()) == [0.0, 0.3, 0.0, 1.0]
    assert figure._suptitle.get_text() == "Held out"


def test_long_names_keep_apart_and_leave_room_for_the_spectrograms():
    name = "acoustic_guitar_in_a_large_hall"
    long = dataclasses.replace(CLIP, name=f"a/{name * 3}.ogg", true=name, predicted=name[::-1])
    figure = clips_figure([long] * 5, title="Held out: " + "word " * 20)
    figure.canvas.draw()
    first, second = (axes.get_window_extent() for axes in figure.axes[:2])
    assert first.width > 200
    for text in (figure.axes[0]._left_title, *figure.axes[0].texts):
        assert text.get_window_extent().x1 < second.x0
    assert figure._suptitle.get_window_extent().x1 < figure.bbox.x1


def test_a_long_path_does_not_leave_the_picture():
    options = {"log_mel": torch.randn(40, 16), "seconds": 2.0, "events": [], "threshold": 0.5}
    names = ("acoustic_guitar_in_a_large_hall" * 2, "b")
    example = TagExample(
        name="folder/" * 40 + "a.wav", class_names=names, probabilities=torch.rand(9, 2), **options
    )
    figure = tags_figure(example)
    figure.canvas.draw()
    assert figure._suptitle.get_window_extent().x1 < figure.bbox.x1
    assert figure._suptitle.get_text().endswith("a.wav")
    assert figure.axes[1].get_window_extent().width > 800


def test_tags_show_what_is_heard_and_what_is_found():
    probabilities = torch.zeros(20, 2)
    probabilities[5:10, 0] = 0.8
    probabilities[15, 1] = 0.6
    example = TagExample(
        log_mel=torch.randn(40, 16),
        seconds=2.0,
        name="b.wav",
        class_names=("cat", "dog"),
        events=[(0.4, 1.0, 0.0)],
        probabilities=probabilities,
        threshold=0.5,
    )
    figure = tags_figure(example)
    above, below = figure.axes
    assert above.images[0].get_array().shape == (16, 40)
    assert [label.get_text() for label in below.get_yticklabels()] == ["cat", "dog"]
    bars = [
        (to_hex(bar.get_facecolor()[0]), bar.get_paths()[0].get_extents().x0)
        for bar in below.collections
        if bar.get_paths()
    ]
    assert ("#b9cfe6", pytest.approx(0.4)) in bars
    found = [start for color, start in bars if color == "#2563a8"]
    assert found == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])
    assert [start for color, start in bars if color == "#d9730d"] == pytest.approx([1.5])
