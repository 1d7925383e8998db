import json

import pytest
import torch

from recipes.audio_classification import AudioClassifier, main
from recipes.audio_data import AudioDataModule
from tests.recipes.audio_runs import PITCHES, tiny_audio, write_damaged, write_tones
from tests.recipes.classification_runs import quiet_trainer
from tests.recipes.text_runs import curve, last_checkpoint_every

REPORT = ["--trainer.callbacks+=recipes.classification_report.ClassificationReport"]


@pytest.fixture
def folder(tmp_path):
    return write_tones(tmp_path / "tones", per_class=12)


def arguments(folder, run_dir, **changes):
    options = {
        "trainer__accelerator": "cpu",
        "trainer__max_epochs": 3,
        "trainer__log_every_n_steps": 1,
        "trainer__default_root_dir": run_dir,
        "model__num_classes": 3,
        "model__optimization__lr": 0.01,
        "data__source": folder,
        "data__batch_size": 6,
    }
    options |= {f"model__model_options__{name}": x for name, x in tiny_audio().items()}
    options |= changes
    return [f"--{name.replace('__', '.')}={value}" for name, value in options.items()]


def test_fit_test_and_predict(folder, tmp_path, capsys):
    write_damaged(folder / "low")
    run_dir = tmp_path / "run"
    options = arguments(
        folder, run_dir, trainer__max_epochs=6, trainer__check_val_every_n_epoch=6, data__seed=1
    )
    main(["fit", *options, *last_checkpoint_every(5), *REPORT])
    out = capsys.readouterr().out
    assert "nearest log-mel statistics" in out
    assert "largest class" in out
    record = json.loads((run_dir / "metrics.json").read_text())
    assert record["metrics"]["test_accuracy"] > 0.9
    compared = record["comparison"]["test"]
    assert compared["this run"]["accuracy"] == record["metrics"]["test_accuracy"]
    assert compared["nearest log-mel statistics"]["accuracy"] > 0.9
    assert compared["regression on them"]["accuracy"] > 0.9
    assert compared["largest class"]["accuracy"] < 0.6
    for name in ("test_confusion", "test_examples", "report"):
        assert (run_dir / f"{name}.png").stat().st_size > 5000
    assert max(curve(run_dir, "train_skipped").values()) > 0

    main(["test", *options])
    assert "this run" in capsys.readouterr().out
    main(["predict", *options, f"--data.predict_source={folder / 'high'}"])
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines() if "\t" in line]
    assert [line[0] for line in lines] == sorted(str(p) for p in (folder / "high").iterdir())
    assert sum(line[1] == "high" for line in lines) > 10


def test_resumed_run_equals_an_unbroken_one(folder, tmp_path):
    step = 7  # within the second of three epochs
    options = {
        "model__model_options__dropout": 0.1,
        "model__mixup_alpha": 0.4,
        "model__baselines": "null",
        "data__num_workers": 1,
    }
    whole = tmp_path / "whole"
    saved = [
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
        f"--trainer.callbacks.dirpath={tmp_path}",
        f"--trainer.callbacks.every_n_train_steps={step}",
        "--trainer.callbacks.save_top_k=-1",
    ]
    main(["fit", *arguments(folder, whole, **options), *saved])
    (checkpoint,) = tmp_path.glob(f"*step={step}.ckpt")
    rest = tmp_path / "rest"
    main(["fit", *arguments(folder, rest, **options), *saved, f"--ckpt_path={checkpoint}"])
    expected = curve(whole, "train_loss")
    assert len(expected) == 15
    assert curve(rest, "train_loss") == {i: x for i, x in expected.items() if i >= step}
    assert curve(rest, "val_loss")[14] == curve(whole, "val_loss")[14]


def test_checkpoint_makes_the_classifier_again(folder, tmp_path):
    task = AudioClassifier(num_classes=3, model_options=tiny_audio(), baselines=None)
    trainer = quiet_trainer(tmp_path, max_steps=1)
    trainer.fit(task, datamodule=AudioDataModule(source=str(folder), batch_size=6))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = AudioClassifier.load_from_checkpoint(tmp_path / "a.ckpt")
    assert again.model.config == task.model.config
    assert again.shown_class_names == tuple(sorted(PITCHES))
    waveform = torch.randn(2, 900)
    torch.testing.assert_close(again.eval().model(waveform), task.eval().model(waveform))


def test_mixed_loss_is_that_of_mixed_sound(monkeypatch):
    task = AudioClassifier(num_classes=3, model_options=tiny_audio(), mixup_alpha=0.4)
    batch = {
        "waveform": torch.randn(2, 900),
        "lengths": torch.tensor([900, 700]),
        "labels": torch.tensor([0, 2]),
    }
    batch["waveform"][1, 700:] = 0
    monkeypatch.setattr("numpy.random.beta", lambda a, b: 0.3)
    mixed = 0.3 * batch["waveform"] + 0.7 * batch["waveform"].flip(0)
    target = torch.tensor([[0.3, 0.0, 0.7], [0.7, 0.0, 0.3]])
    expected = torch.nn.functional.cross_entropy(task.model(mixed), target)
    torch.testing.assert_close(task.training_loss(batch), expected)
    task.mixup_alpha = 0.0
    plain = torch.nn.functional.cross_entropy(
        task.model(batch["waveform"], batch["lengths"]), batch["labels"]
    )
    torch.testing.assert_close(task.training_loss(batch), plain)


def test_damaged_recording_stops_the_run_if_asked(folder, tmp_path, capsys):
    write_damaged(folder / "low")
    options = arguments(folder, tmp_path / "run", data__on_error="raise")
    with pytest.raises(SystemExit):
        main(["fit", *options])
    err = capsys.readouterr().err
    assert str(folder / "low") in err
    assert "--data.on_error skip" in err


def test_wrong_models_are_refused():
    with pytest.raises(ValueError, match="must be an audio model, got 'longvit_tiny_patch8_64'"):
        AudioClassifier(model_name="longvit_tiny_patch8_64")
    with pytest.raises(ValueError, match=r"mixup_alpha must be 0 or more, got -0.5"):
        AudioClassifier(mixup_alpha=-0.5)
