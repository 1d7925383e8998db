"""The bar and the lines that say how far a training is."""

from types import SimpleNamespace

import torch

from recipes.progress import LineProgress, StepBar, progress_text
from recipes.text_lm import TextLM
from tests.recipes.text_runs import make_data, make_trainer, model_options


def make_task():
    return TextLM(model_options=model_options())


def test_lines_stand_in_for_a_progress_bar(corpus, tmp_path, capsys):
    data, task = make_data(corpus), make_task()
    trainer = make_trainer(tmp_path, callbacks=[LineProgress(every_seconds=0)])
    trainer.fit(task, datamodule=data)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/3", "step 2/3", "step 3/3"]
    assert lines[2].startswith("step 3/3  train ")
    assert lines[2].endswith(" tokens/s")


def test_the_last_line_has_the_last_validation(corpus, tmp_path, capsys):
    callbacks = [LineProgress(every_seconds=1000)]
    trainer = make_trainer(tmp_path, callbacks=callbacks, val_check_interval=3)
    trainer.fit(make_task(), datamodule=make_data(corpus))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/3", "step 3/3"]
    value = float(trainer.callback_metrics["val_bits_per_byte"])
    assert f"  val {value:.3f} bits/byte" in lines[1]


def test_bar_counts_steps_in_one_line_and_begins_where_a_run_resumes(corpus, tmp_path, capsys):
    args = {"callbacks": [StepBar()], "enable_progress_bar": True}
    trainer = make_trainer(tmp_path, **args)
    trainer.fit(make_task(), datamodule=make_data(corpus))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("3/3 ")
    assert "tokens/s 0:00:0" in line
    trainer.save_checkpoint(tmp_path / "last.ckpt")

    class Watched(StepBar):
        def on_train_start(self, *args):
            super().on_train_start(*args)
            self.first = self._progress.tasks[0].completed

    bar = Watched()
    trainer = make_trainer(tmp_path, **(args | {"callbacks": [bar], "max_steps": 4}))
    trainer.fit(make_task(), datamodule=make_data(corpus), ckpt_path=tmp_path / "last.ckpt")
    assert bar.first == 3
    bar.print("[red]")
    assert "[red]" in capsys.readouterr().out


def test_bar_is_silent_where_it_is_disabled(corpus, tmp_path, capsys):
    bar = StepBar()
    bar.disable()
    options = {"callbacks": [bar], "enable_progress_bar": True, "num_sanity_val_steps": 0}
    make_trainer(tmp_path, **options).fit(make_task(), datamodule=make_data(corpus))
    assert capsys.readouterr().out == ""
    bar.enable()
    assert bar._is_enabled


def test_other_tasks_show_all_their_metrics():
    metrics = {"accuracy": torch.tensor(0.5), "loss": torch.tensor(2)}
    trainer = SimpleNamespace(callback_metrics=metrics)
    assert progress_text(trainer, object()) == "accuracy 0.5  loss 2"
