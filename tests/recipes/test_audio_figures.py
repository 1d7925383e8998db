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
