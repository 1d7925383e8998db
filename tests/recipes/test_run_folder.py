"""What a run leaves in its folder, and what happens to the run before."""

from recipes.run_folder import CurveLogger, make_room, read_curves
from recipes.text_lm import main
from tests.recipes.text_runs import arguments, curve, last_checkpoint_every


def test_running_twice_keeps_the_run_before_and_no_more(corpus, tmp_path):
    for steps in (1, 2, 3):
        args = arguments(corpus, tmp_path, trainer__max_steps=steps)
        main(["fit", *args, *last_checkpoint_every(1)])
    assert sorted(curve(tmp_path, "train_loss")) == [0, 1, 2]
    assert sorted(curve(tmp_path / "previous", "train_loss")) == [0, 1]
    names = {"checkpoints", "config.yaml", "metrics.csv", "tensorboard"}
    assert {path.name for path in tmp_path.iterdir()} == {*names, "previous"}
    assert {path.name for path in (tmp_path / "previous").iterdir()} == names
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_making_room_touches_nothing_else(tmp_path):
    (tmp_path / "metrics.csv").write_text("step\n")
    (tmp_path / "thesis.tex").write_text("precious")
    told = f"The run before lies in {tmp_path / 'previous'} now"
    assert make_room(tmp_path, ckpt_path=None) == f"{told}."
    assert (tmp_path / "thesis.tex").read_text() == "precious"
    assert not (tmp_path / "metrics.csv").exists()
    assert make_room(tmp_path, ckpt_path=None) is None
    (tmp_path / "metrics.csv").write_text("step\n")
    gone = "the run that lay there is gone"
    assert make_room(tmp_path, ckpt_path=None) == f"{told}; {gone}."


def test_resuming_a_checkpoint_of_another_folder_starts_a_new_run(tmp_path):
    (tmp_path / "metrics.csv").write_text("step\n")
    assert make_room(tmp_path, ckpt_path=tmp_path / "checkpoints" / "last.ckpt") is None
    assert make_room(tmp_path, ckpt_path=tmp_path.parent / "other" / "last.ckpt") is not None


def test_curve_goes_on_where_the_checkpoint_was_and_drops_a_torn_row(tmp_path):
    first = CurveLogger(tmp_path)
    for step in range(4):
        first.log_metrics({"loss": 10.0 - step}, step)
    first.log_metrics({"val": 1.5}, 3)
    with first.path.open("a") as file:
        file.write("4,6.")
    second = CurveLogger(tmp_path)
    second.log_metrics({"loss": 0.5}, 2)
    second.log_metrics({"new": 7.0}, 2)
    assert read_curves(first.path) == {
        "loss": [(1, 10.0), (2, 9.0), (3, 0.5)],
        "val": [],
        "new": [(3, 7.0)],
    }
