"""The captioning recipe: it learns, goes on where it stopped, reports, and writes for users."""

import json
import logging

import pytest
import torch

from recipes.captioning import Captioner, main
from recipes.captioning_report import CaptionReport, captions_figure
from recipes.run_folder import update_record
from tests.recipes.captioning_runs import TINY, make_data, make_task, write_shard, write_table
from tests.recipes.classification_runs import quiet_trainer
from tests.recipes.text_runs import curve, last_checkpoint_every

REPORT = [
    "--trainer.callbacks+=recipes.captioning_report.CaptionReport",
    "--trainer.callbacks.num_shown=3",
]


@pytest.fixture
def folder(tmp_path):
    return write_table(tmp_path / "table")


def arguments(source, run_dir, **changes):
    options = {
        "trainer__accelerator": "cpu",
        "trainer__max_steps": 8,
        "trainer__log_every_n_steps": 1,
        "trainer__val_check_interval": 4,
        "trainer__check_val_every_n_epoch": "null",
        "trainer__default_root_dir": run_dir,
        "model__max_new_tokens": 12,
        "model__optimization__lr": 0.01,
        "data__source": source,
        "data__batch_size": 4,
    }
    options |= {f"model__model_options__{name}": x for name, x in TINY.items()}
    options |= changes
    return [f"--{name.replace('__', '.')}={value}" for name, value in options.items()]


def test_what_is_skipped_is_counted(folder, tmp_path, capsys):
    (folder / "003.png").write_bytes(b"")
    (folder / "021.png").write_bytes(b"")
    options = {"trainer__max_steps": 4, "trainer__val_check_interval": 100}
    main(["fit", *arguments(folder, tmp_path / "run", **options), *REPORT])
    out = capsys.readouterr().out
    assert "skipped 1 of 17 pairs in training; the log says which" in out
    # The test of the report.
    assert "skipped 1 of 4 pairs in test; the log says which" in out


def test_fit_test_and_predict(folder, tmp_path, capsys):
    """It learns which word belongs to which colour, and shows it."""
    run_dir = tmp_path / "run"
    options = {"trainer__max_steps": 60, "trainer__val_check_interval": 30}
    options |= {"model__optimization__optimizer": "muon", "model__optimization__lr": 0.02}
    options = arguments(folder, run_dir, **options)
    main(["fit", *options, *last_checkpoint_every(50), *REPORT])
    out = capsys.readouterr().out
    assert "on held-out images" in out
    record = json.loads((run_dir / "metrics.json").read_text())
    metrics = record["metrics"]
    assert metrics["test_exact"] == metrics["test_word_f1"] == 1.0
    assert metrics["test_token_accuracy"] == 1.0
    # Which of three words it is, text cannot tell: log2(3) bits of each caption.
    assert metrics["test_bits_per_byte"] < 0.5 * metrics["test_bits_per_byte_without_image"]
    assert metrics["steps"] == 60
    shown = record["test_captions"]
    assert len(shown) == 3
    assert all(caption["true"] == caption["written"] for caption in shown)
    assert (run_dir / "captions.png").stat().st_size > 5000
    losses = list(curve(run_dir, "train_loss").values())
    assert losses[-1] < 0.1 * losses[0]
    assert set(curve(run_dir, "val_skipped").values()) == {0.0}
    assert curve(run_dir, "val_token_accuracy")[59] == 1.0

    update_record(run_dir, metrics={"test_exact": 0.0})
    main(["test", *options])
    assert "test_exact" in capsys.readouterr().out
    tested = json.loads((run_dir / "metrics.json").read_text())["metrics"]
    assert (tested["test_exact"], tested["steps"]) == (1.0, 60)
    assert tested["test_loss"] == pytest.approx(metrics["test_loss"], rel=1e-4)
    photos = write_table(tmp_path / "photos", count=6)
    main(["predict", *options, f"--data.predict_source={photos}"])
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines() if "\t" in line]
    colours = ["red", "green", "blue"]
    assert lines == [[str(photos / f"{i:03d}.png"), f"a {colours[i % 3]} one"] for i in range(6)]


def test_resumed_run_equals_an_unbroken_one(tmp_path):
    shard = write_shard(tmp_path / "train.tar")
    options = {"model__model_options__dropout": 0.1}
    saved = [
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
        f"--trainer.callbacks.dirpath={tmp_path}",
        "--trainer.callbacks.every_n_train_steps=5",
        "--trainer.callbacks.save_top_k=-1",
    ]
    main(["fit", *arguments(shard, tmp_path / "whole", **options), *saved])
    (checkpoint,) = tmp_path.glob("*step=5.ckpt")
    rest = arguments(shard, tmp_path / "rest", **options)
    main(["fit", *rest, *saved, f"--ckpt_path={checkpoint}"])
    expected = curve(tmp_path / "whole", "train_loss")
    assert len(expected) == 8
    resumed = curve(tmp_path / "rest", "train_loss")
    assert resumed == {step: x for step, x in expected.items() if step >= 5}


def test_damaged_pairs_are_counted_and_named(folder, tmp_path, caplog):
    for name in ("003.png", "017.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:200])
    table = (folder / "pairs.csv").read_text().replace("005.png,a blue one", "005.png, ")
    (folder / "pairs.csv").write_text(table)
    run_dir = tmp_path / "run"
    with caplog.at_level(logging.WARNING):
        main(["fit", *arguments(folder, run_dir), *REPORT])
    assert "cannot read" in caplog.text
    assert "an empty one for" in caplog.text
    assert "005.png" in caplog.text
    skipped = curve(run_dir, "train_skipped")
    assert sum(skipped.values()) >= 2
    # Three of the four test pairs are left.
    record = json.loads((run_dir / "metrics.json").read_text())
    assert len(record["test_captions"]) == 3
    trainer = quiet_trainer(tmp_path / "python")
    trainer.test(make_task(), datamodule=make_data(folder), verbose=False)
    assert trainer.callback_metrics["test_skipped"] == 1.0
    with pytest.raises(ValueError, match=r"cannot read .*017.png.*--data.on_error skip"):
        trainer.test(make_task(), datamodule=make_data(folder, on_error="raise"), verbose=False)


def test_pairs_that_are_missing_count_for_nothing(folder, tmp_path):
    class Trainer:
        datamodule = make_data(folder)

    task = make_task().eval()
    Trainer.datamodule.setup("test", model=task.model)
    task._trainer = trainer = quiet_trainer(tmp_path)
    trainer.datamodule = Trainer.datamodule
    (batch,) = Trainer.datamodule.test_dataloader()
    scores, fewer = task.new_scores(), task.new_scores()
    batch["names"][1] = ""
    tokens, is_padding = task.texts(batch)
    assert (tokens[:, 0] == 256).all()
    assert is_padding.sum(1).tolist()[1] == tokens.shape[1] - 1
    with torch.no_grad():
        task.score(batch, scores)
        pairs = task.score_texts(batch, scores)
        others = [0, 2, 3]
        part = {name: [x[i] for i in others] for name, x in batch.items() if isinstance(x, list)}
        part |= {name: batch[name][others] for name in ("images", "tokens")}
        task.score(part, fewer)
        assert task.score_texts(part, fewer) == pairs
    assert len(pairs) == 3
    assert scores.figures() == pytest.approx(fewer.figures(), rel=1e-5)


def test_long_captions_are_counted(folder, tmp_path):
    options = {"model_options": {**TINY, "max_text_len": 6}, "max_new_tokens": 6}
    trainer = quiet_trainer(tmp_path)
    trainer.test(make_task(**options), datamodule=make_data(folder), verbose=False)
    assert trainer.callback_metrics["test_truncated"] == 4.0


def test_every_trained_parameter_gets_a_gradient(folder, tmp_path):
    """Processes that share the work wait for all of them."""
    task = make_task()
    trainer = quiet_trainer(tmp_path, max_epochs=-1, max_steps=1)
    seen = {}
    task.on_before_optimizer_step = lambda optimizer: seen.update(
        {name: x.grad is not None for name, x in task.model.named_parameters()}
    )
    trainer.fit(task, datamodule=make_data(folder))
    assert [name for name, has in seen.items() if not has] == ["image_embed.mask_token"]
    assert not task.model.image_embed.mask_token.requires_grad


def test_checkpoint_makes_the_model_again(folder, tmp_path):
    trainer = quiet_trainer(tmp_path, max_epochs=-1, max_steps=1)
    trainer.fit(make_task(), datamodule=make_data(folder))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = Captioner.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert loaded.model.config.heads == ("masked_text",)
    assert loaded.model.config.segment_lengths == (4, 32)
    assert loaded.max_new_tokens == 12


def test_report_without_held_out_pairs(folder, tmp_path, capsys):
    table = (folder / "pairs.csv").read_text().replace("val", "train").replace("test", "train")
    (folder / "pairs.csv").write_text(table)
    main(["fit", *arguments(folder, tmp_path / "run", trainer__max_steps=2), *REPORT])
    assert "No report: nothing that is held out" in capsys.readouterr().out
    assert not (tmp_path / "run" / "captions.png").exists()


def test_report_where_no_held_out_pair_can_be_read(folder, tmp_path, capsys):
    for line in (folder / "pairs.csv").read_text().splitlines():
        if line.endswith((",val", ",test")):
            (folder / line.split(",")[0]).write_bytes(b"")
    main(["fit", *arguments(folder, tmp_path / "run", trainer__max_steps=2), *REPORT])
    out = capsys.readouterr().out
    assert "No report: nothing that is held out for validation or test has been read." in out


def test_report_of_validation_and_without_counting(folder, tmp_path):
    table = (folder / "pairs.csv").read_text().replace(",test", ",val")
    (folder / "pairs.csv").write_text(table)
    run_dir = tmp_path / "run"
    counted = "--trainer.callbacks.num_counted=0"
    options = {"trainer__max_steps": 1, "trainer__val_check_interval": 1}
    main(["fit", *arguments(folder, run_dir, **options), *REPORT, counted])
    metrics = json.loads((run_dir / "metrics.json").read_text())["metrics"]
    assert "val_exact" in metrics
    assert not any("without_image" in name for name in metrics)


def test_figure_shows_images_and_both_captions():
    shown = [(torch.rand(4, 4, 3), "a $red bell", "a $blue bell"), (torch.rand(4, 4, 3), "x", "x")]
    figure = captions_figure([*shown, (torch.rand(4, 4, 3), "y " * 99, "")], title="Title")
    texts = [[axes.get_title(), axes.texts[0].get_text()] for axes in figure.axes]
    assert texts[:2] == [["a $red bell", "a $blue bell"], ["x", "x"]]
    assert texts[2][0].endswith("…")
    assert texts[2][1] == "(nothing)"
    # Some writing has no spaces.
    (axes,) = captions_figure([(torch.rand(4, 4, 3), "z" * 99, "")], title="Title").axes
    assert axes.get_title().startswith("zzz")
    assert axes.get_title().endswith("…")
    colours = [axes.texts[0].get_color() for axes in figure.axes]
    assert colours[0] != colours[1]
    assert figure.get_suptitle().startswith("Title: images that were held out")
    figure.canvas.draw()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_name": "longvit_tiny_patch8_64"}, "got 'longvit_tiny_patch8_64', which is none"),
        ({"max_new_tokens": 0}, "max_text_len=24, or null for that, got 0"),
        ({"max_new_tokens": 25}, "max_text_len=24, or null for that, got 25"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else None,
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_task(**options)


def test_bad_numbers_of_the_report_are_refused():
    with pytest.raises(ValueError, match="got num_shown=0 and num_counted=10000"):
        CaptionReport(num_shown=0)
    with pytest.raises(ValueError, match="got num_shown=24 and num_counted=-1"):
        CaptionReport(num_counted=-1)
