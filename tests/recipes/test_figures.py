import sys
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

import longnet_zoo as lz
from recipes.figures import confusion_figure, curves_figure, log_figure, pattern_figure

COUNTS = torch.tensor([[3, 1, 0], [0, 0, 0], [2, 0, 1234]])
NAMES = ("cat", "dog", "a long name")


def texts(axes):
    return {(int(t.get_position()[0]), int(t.get_position()[1])): t.get_text() for t in axes.texts}


def test_confusion_cells_hold_count_and_share_of_the_true_class():
    figure = confusion_figure(COUNTS, NAMES, title="Test")
    axes = figure.axes[0]
    # Places are (column, row); empty cells stay empty.
    assert texts(axes) == {
        (0, 0): "3\n75%",
        (1, 0): "1\n25%",
        (0, 2): "2\n0%",
        (2, 2): "1,234\n100%",
    }
    assert [label.get_text() for label in axes.get_yticklabels()] == list(NAMES)
    assert [label.get_text() for label in axes.get_xticklabels()] == list(NAMES)
    assert figure.get_suptitle() == "Test: 1,240 samples, 99.8% right"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")


def test_confusion_of_many_classes_is_not_written_into():
    number = 30
    figure = confusion_figure(torch.eye(number), [str(i) for i in range(number)])
    assert not figure.axes[0].texts


@pytest.mark.parametrize("number", [2, 6, 10, 24, 40])
@pytest.mark.parametrize("prefix", ["", "a class whose name is really a long one "])
def test_confusion_is_not_cut_off_and_its_counts_keep_apart(number, prefix):
    names = [f"{prefix}{i}" for i in range(number)]
    counts = torch.full((number, number), 12_345)
    figure = confusion_figure(counts, names, title="Where is most haematoxylin? One slide, cut up")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    # In inches.
    needed, whole = figure.get_tightbbox(renderer), figure.get_size_inches()
    assert needed.x0 >= -0.01
    assert needed.y0 >= -0.01
    assert needed.x1 <= whole[0] + 0.01
    assert needed.y1 <= whole[1] + 0.01
    axes = figure.axes[0]
    cell = axes.get_window_extent(renderer).width / number
    # Long names leave room for the cells.
    assert cell * number > 0.4 * renderer.width
    assert all(text.get_window_extent(renderer).width < cell for text in axes.texts)
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert len(set(labels)) == number
    assert max(map(len, labels)) <= 24


def test_confusion_without_samples_can_be_drawn(tmp_path):
    figure = confusion_figure(torch.zeros(2, 2), ("a", "b"))
    figure.savefig(tmp_path / "empty.png")
    assert figure.get_suptitle() == "Confusion matrix: 0 samples"


def test_confusion_needs_a_name_for_each_class():
    with pytest.raises(ValueError, match=r"shape \(3, 3\) and 2 class_names"):
        confusion_figure(COUNTS, ("a", "b"))


def test_pattern_shows_the_usual_length_and_at_most_eight_heads():
    config = lz.model_info("longvit_small_patch32_1024").config
    figure = pattern_figure(config)
    assert len(figure.axes) == 8 < config.num_heads
    assert any("1,024 tokens" in text.get_text() for text in figure.texts)


def test_pattern_too_long_to_draw_is_cut_until_its_segments_show():
    config = lz.model_info("longvit_small_patch32_32768").config
    words = " ".join(text.get_text() for text in pattern_figure(config).texts)
    assert "1,048,576 tokens" not in words
    assert "bidirectional" in words
    with pytest.raises(ValueError, match="seq_len must be an integer of at least 1, got 0"):
        pattern_figure(config, seq_len=0)


def test_curves_have_the_logged_points():
    curves = {"train_loss": [(1, 2.0), (2, 1.0)], "val_accuracy": [(2, 0.5)], "lr": [(1, 1.0)]}
    loss, accuracy = curves_figure(curves, title="a run").axes
    (line,) = loss.lines
    assert line.get_xydata().tolist() == [[1, 2.0], [2, 1.0]]
    (line,) = accuracy.lines
    assert line.get_xydata().tolist() == [[2, 0.5]]
    # A run without validation has none.
    assert not curves_figure({}, title="a run").axes[0].lines


class ImageLogger:
    def __init__(self):
        self.images = []

    def log_image(self, key, images):
        self.images.append((key, images))


def test_figures_reach_folder_and_loggers(tmp_path):
    tensorboard, other = TensorBoardLogger(tmp_path / "tb"), ImageLogger()
    trainer = SimpleNamespace(
        is_global_zero=True,
        fast_dev_run=False,
        default_root_dir=tmp_path / "run",
        global_step=7,
        loggers=[tensorboard, other, SimpleNamespace()],
    )
    log_figure(trainer, "confusion", confusion_figure(COUNTS, NAMES))
    path = tmp_path / "run" / "confusion.png"
    with Image.open(path) as image:
        assert min(image.size) > 300
    assert other.images == [("confusion", [str(path)])]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tensorboard.experiment.flush()
    events = EventAccumulator(tensorboard.log_dir)
    events.Reload()
    (image,) = events.Images("confusion")
    assert image.step == 7
    tensorboard.experiment.close()


@pytest.mark.parametrize("change", [{"is_global_zero": False}, {"fast_dev_run": True}])
def test_nothing_is_written_elsewhere(tmp_path, change):
    state = {"is_global_zero": True, "fast_dev_run": False, "default_root_dir": tmp_path / "run"}
    log_figure(SimpleNamespace(**(state | change)), "confusion", confusion_figure(COUNTS, NAMES))
    assert not (tmp_path / "run").exists()


def test_names_are_drawn_as_they_are_written(tmp_path):
    """Two dollar signs are no formula, and a byte that is no UTF-8 in a file's name no error."""
    figure = confusion_figure(COUNTS, ("a$^$", r"$\oops$", "c"), title="costs $_$")
    figure.axes[0].set_title("rec\udce9.wav")
    state = {"is_global_zero": True, "fast_dev_run": False, "default_root_dir": tmp_path}
    log_figure(SimpleNamespace(loggers=[], **state), "confusion", figure)
    assert (tmp_path / "confusion.png").is_file()
    assert next(label.get_text() for label in figure.axes[0].get_xticklabels()) == "a$^$"
    assert figure.axes[0].get_title() == "rec?.wav"


def test_no_figure_is_kept_by_pyplot():
    confusion_figure(COUNTS, NAMES)
    pattern_figure(lz.model_info("longvit_tiny_patch8_64").config)
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []
