import json

import pytest
import torch

from recipes.audio_data import AudioDataModule
from recipes.audio_tagging import AudioTagger, main
from recipes.classification_metrics import UNLABELLED
from tests.recipes.audio_runs import RATE, tiny_audio, write_tones
from tests.recipes.classification_runs import quiet_trainer
from tests.recipes.text_runs import curve, last_checkpoint_every


@pytest.fixture
def folder(tmp_path):
    return write_tones(tmp_path / "tones", per_class=8)


def arguments(folder, run_dir, **changes):
    options = {
        "trainer__accelerator": "cpu",
        "trainer__max_epochs": 3,
        "trainer__log_every_n_steps": 1,
        "trainer__default_root_dir": run_dir,
        "model__num_classes": 3,
        "model__optimization__lr": 0.02,
        "data__source": folder,
        "data__batch_size": 6,
        "data__soundscapes__seconds": 1.0,
        "data__soundscapes__num_train": 24,
        "data__soundscapes__num_val": 4,
        "data__soundscapes__num_test": 6,
    }
    options |= {f"model__model_options__{name}": x for name, x in tiny_audio().items()}
    options |= changes
    return [f"--{name.replace('__', '.')}={value}" for name, value in options.items()]


def test_fit_test_and_predict(folder, tmp_path, capsys):
    run_dir = tmp_path / "run"
    report = ["--trainer.callbacks+=recipes.tagging_report.TaggingReport"]
    options = arguments(folder, run_dir, trainer__max_epochs=9, trainer__check_val_every_n_epoch=9)
    main(["fit", *options, *last_checkpoint_every(5), *report])
    out = capsys.readouterr().out
    assert "regression on single frames" in out
    assert "36 steps in" in out
    record = json.loads((run_dir / "metrics.json").read_text())
    assert record["metrics"]["test_f1"] > 0.8
    assert record["metrics"]["test_map"] > 0.8
    assert record["metrics"]["steps"] == 36
    assert set(record["test_classes"]) == {"high", "low", "middle"}
    compared = record["comparison"]["test"]
    assert compared["this run"]["f1"] == record["metrics"]["test_f1"]
    assert compared["regression on single frames"]["map"] > 0.7
    assert compared["how often each sounds"]["f1"] < 0.6
    for name in ("test_examples", "pattern"):
        assert (run_dir / f"{name}.png").stat().st_size > 5000
    assert curve(run_dir, "val_f1")

    main(["test", *options])
    assert "regression on single frames" in capsys.readouterr().out
    main(["predict", *options, f"--data.predict_source={folder / 'low'}"])
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines() if "\t" in line]
    assert {line[0] for line in lines} == {str(p) for p in (folder / "low").iterdir()}
    assert sum(line[1] == "low" for line in lines) > 0.7 * len(lines)
    assert all(0 <= float(line[2]) < float(line[3]) <= 0.36 for line in lines)


def test_resumed_run_equals_an_unbroken_one(folder, tmp_path):
    options = {"model__baselines": "null", "model__model_options__dropout": 0.1}
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    saved = [
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
        f"--trainer.callbacks.dirpath={tmp_path}",
        "--trainer.callbacks.every_n_train_steps=6",
        "--trainer.callbacks.save_top_k=-1",
    ]
    main(["fit", *arguments(folder, whole, **options), *saved])
    (checkpoint,) = tmp_path.glob("*step=6.ckpt")
    main(["fit", *arguments(folder, rest, **options), *saved, f"--ckpt_path={checkpoint}"])
    expected = curve(whole, "train_loss")
    assert len(expected) == 12
    assert curve(rest, "train_loss") == {i: x for i, x in expected.items() if i >= 6}


def made(**options):
    return AudioTagger(num_classes=3, model_options=tiny_audio(), **options)


def test_tags_and_loss_leave_padding_out():
    task = made().eval()
    batch = {
        "waveform": torch.randn(2, 1600),
        "lengths": torch.tensor([1600, 640]),
        "events": [torch.tensor([[0.0, 0.1, 2.0]]), torch.tensor([[0.05, 0.08, 1.0]])],
    }
    # 25 frames a second, of 160 samples.
    tags = task.labels(batch)
    assert tags.shape == (2, 10, 3)
    assert tags[0, :, 2].tolist() == [1, 1, 1, *[0] * 7]
    assert (tags[1, 4:] == UNLABELLED).all()
    logits = task.logits(batch)
    single = [
        task.logits({"waveform": batch["waveform"][i : i + 1, :n], "lengths": torch.tensor([n])})
        for i, n in enumerate((1600, 640))
    ]
    sums = [
        torch.nn.functional.binary_cross_entropy_with_logits(
            x[0], tags[i, : x.shape[1]].float(), reduction="sum"
        )
        for i, x in enumerate(single)
    ]
    torch.testing.assert_close(task.loss(logits, tags), sum(sums) / (14 * 3))
    assert task.loss(logits, torch.full_like(tags, UNLABELLED)).item() == 0.0


def test_checkpoint_makes_the_tagger_again(folder, tmp_path):
    # Which split a recording is in depends on its path as written.
    paths = sorted(path.relative_to(tmp_path) for path in folder.rglob("*.wav"))
    rows = [f"{path},{path.parent.name},0.05,0.15\n" for path in paths]
    (tmp_path / "t.csv").write_text("path,tag,start,end\n" + "".join(rows))
    task = made(baselines=None, threshold=0.3)
    trainer = quiet_trainer(tmp_path, max_steps=1)
    trainer.fit(task, datamodule=AudioDataModule(source=str(tmp_path / "t.csv"), batch_size=6))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = AudioTagger.load_from_checkpoint(tmp_path / "a.ckpt")
    assert (again.model.config, again.threshold) == (task.model.config, 0.3)
    waveform = torch.randn(1, RATE)
    torch.testing.assert_close(again.eval().model(waveform), task.eval().model(waveform))


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match=r"threshold must be in \(0, 1\), got 1.0"):
        made(threshold=1.0)
    with pytest.raises(ValueError, match="must be an audio model, got 'longvit_tiny_patch8_64'"):
        AudioTagger(model_name="longvit_tiny_patch8_64")
