import json
import re

import pytest
import torch
import yaml

import longnet_zoo as lz
from longnet_zoo.layers import MemorySaving
from recipes.cli import RecipeCLI
from recipes.image_classification import ImageClassifier, MixupConfig, main
from recipes.image_data import ImageDataModule
from recipes.run_folder import make_room
from tests.recipes.classification_runs import quiet_trainer, tiny_vit, write_images
from tests.recipes.text_runs import curve, last_checkpoint_every


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "images", per_class=14)


def arguments(folder, run_dir, **changes):
    options = {
        "trainer__accelerator": "cpu",
        "trainer__max_epochs": 4,
        "trainer__log_every_n_steps": 1,
        "trainer__default_root_dir": run_dir,
        "model__num_classes": 3,
        "model__optimization__lr": 0.01,
        "data__source": folder,
        "data__batch_size": 6,
        "data__augmentation__scale": [0.7, 1.0],
    }
    options |= {f"model__model_options__{name}": x for name, x in tiny_vit().items()}
    options |= changes
    return [f"--{name.replace('__', '.')}={value}" for name, value in options.items()]


PUBLISHED = {"head_offset": "block", "padded_keys": "zero"}

REPORT = ["--trainer.callbacks+=recipes.classification_report.ClassificationReport"]


def test_fit_test_and_predict(folder, tmp_path, capsys):
    run_dir = tmp_path / "run"
    options = arguments(folder, run_dir, trainer__max_epochs=8)
    main(["fit", *options, *last_checkpoint_every(5), *REPORT])
    out = capsys.readouterr().out
    assert "class  samples  recall  precision" in out
    record = json.loads((run_dir / "metrics.json").read_text())
    assert record["metrics"]["test_accuracy"] > 0.9
    assert record["metrics"]["steps"] == 8 * 4
    assert set(record["test_classes"]) == {"red", "green", "blue"}
    assert sum(map(sum, record["test_confusion"])) > 3
    for name in ("val_confusion", "test_confusion", "pattern", "report"):
        assert (run_dir / f"{name}.png").stat().st_size > 5000
    assert list((run_dir / "tensorboard").iterdir())
    losses = list(curve(run_dir, "train_loss").values())
    assert losses[-1] < 0.5 * losses[0]
    assert set(curve(run_dir, "val_skipped").values()) == {0.0}

    record["metrics"]["test_accuracy"], record["test_confusion"] = 0.0, []
    (run_dir / "metrics.json").write_text(json.dumps(record))
    main(["test", *options])
    assert "test_accuracy" in capsys.readouterr().out
    tested = json.loads((run_dir / "metrics.json").read_text())
    assert tested["metrics"]["test_accuracy"] > 0.9
    assert tested["metrics"]["steps"] == 8 * 4
    assert sum(map(sum, tested["test_confusion"])) > 3
    main(["predict", *options, f"--data.predict_source={folder / 'red'}"])
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines() if "\t" in line]
    assert [line[0] for line in lines] == sorted(str(p) for p in (folder / "red").iterdir())
    assert sum(line[1] == "red" for line in lines) > 12
    assert all(0 <= float(line[2]) <= 1 for line in lines)

    # A run writes nothing that the next one would take for its own.
    make_room(run_dir, ckpt_path=None)
    assert [path.name for path in run_dir.iterdir()] == ["previous"]


# Four steps are an epoch.
@pytest.mark.parametrize(("step", "workers"), [(6, 1), (8, 0)])
def test_resumed_run_equals_an_unbroken_one(folder, tmp_path, step, workers):
    options = {
        "model__model_options__dropout": 0.1,
        "model__mixup__mixup_alpha": 0.8,
        "model__mixup__cutmix_alpha": 1.0,
        "data__num_workers": workers,
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
    assert len(expected) == 16
    assert curve(rest, "train_loss") == {i: x for i, x in expected.items() if i >= step}
    assert curve(rest, "val_loss")[15] == curve(whole, "val_loss")[15]


def test_checkpoint_makes_the_classifier_again(folder, tmp_path):
    weights = lz.create_model("longvit_tiny_patch8_64", num_classes=0, **tiny_vit()).state_dict()
    torch.save(weights, tmp_path / "weights.pth")
    task = ImageClassifier(
        num_classes=3,
        model_options={**tiny_vit(), "head_offset": "block"},
        pretrained=str(tmp_path / "weights.pth"),
        mixup=MixupConfig(mixup_alpha=0.5),
    )
    trainer = quiet_trainer(tmp_path, max_steps=1)
    data = ImageDataModule(source=str(folder), batch_size=6)
    trainer.fit(task, datamodule=data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    # The weights to start from are not asked for again.
    (tmp_path / "weights.pth").unlink()
    again = ImageClassifier.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert again.model.config == task.model.config
    assert again.model.config.head_offset == "block"
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(again.model.eval()(images), task.model.eval()(images))
    assert again.class_names == ("blue", "green", "red")


def test_checkpoint_replaces_pretrained_weights_and_brings_their_options(folder, tmp_path, capsys):
    # Weights of seven classes under the published names, whose patterns are not our default.
    weights = lz.create_model(
        "longvit_tiny_patch8_64", **tiny_vit(), **PUBLISHED, num_classes=7, qk_norm=False
    )
    torch.save(lz.weights.to_published_state_dict(weights), tmp_path / "published.pth")
    given = {
        "model__pretrained": tmp_path / "published.pth",
        "model__model_options__num_classes": 7,
    }
    run_dir = tmp_path / "run"
    options = arguments(folder, run_dir, trainer__max_epochs=1, **given)
    main(["fit", *options])
    trained = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    assert trained["hyper_parameters"]["model_options"]["head_offset"] == "block"
    (tmp_path / "published.pth").unlink()
    capsys.readouterr()
    main(["test", *options])
    assert "test_accuracy" in capsys.readouterr().out
    built = RecipeCLI(ImageClassifier, ImageDataModule, args=["predict", *options])
    assert built.model.model.config.head_offset == "block"
    assert built.model.model.config.padded_keys == "zero"
    # The settings of a resumed run still say how it began.
    main(["fit", *options, "--trainer.max_epochs=2", "--ckpt_path=last"])
    saved = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert saved["model"]["pretrained"] == str(tmp_path / "published.pth")


def test_checkpoint_of_another_pattern_is_refused_from_python_too(folder, tmp_path):
    data = ImageDataModule(source=str(folder), batch_size=6)
    trainer = quiet_trainer(tmp_path, max_steps=1)
    trainer.fit(ImageClassifier(num_classes=3, model_options=tiny_vit()), datamodule=data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    other = ImageClassifier(num_classes=3, model_options={**tiny_vit(), "head_offset": "block"})
    with pytest.raises(ValueError, match=r"head_offset='block' and a checkpoint of .*='modulo'"):
        trainer.test(other, datamodule=data, ckpt_path=tmp_path / "a.ckpt", weights_only=True)


def test_without_callbacks_it_says_what_came_out_and_can_be_tested(folder, tmp_path, capsys):
    options = arguments(folder, tmp_path, trainer__max_epochs=2)
    main(["fit", *options])
    *_, last = (line for line in capsys.readouterr().out.splitlines() if line.startswith("step"))
    assert last.startswith("step 8  train loss ")
    (accuracy,) = re.findall(r"val accuracy (\S+)%", last)
    assert float(accuracy) == pytest.approx(100 * curve(tmp_path, "val_accuracy")[7], abs=0.05)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    main(["test", *options])
    tested = json.loads((tmp_path / "metrics.json").read_text())
    assert set(tested["test_classes"]) == {"red", "green", "blue"}


@pytest.mark.parametrize("name", ["gigapath_slide_enc12l768d", "longnet_lm_tiny"])
def test_models_for_something_else_are_refused(name):
    message = rf"a vision model, got '{name}', which is none \(family '.*longvit_tiny_patch8_64"
    with pytest.raises(ValueError, match=message):
        ImageClassifier(model_name=name)


def test_mixed_batches_have_mixed_targets(monkeypatch):
    mixup = MixupConfig(mixup_alpha=1.0)
    task = ImageClassifier(num_classes=3, model_options=tiny_vit(), mixup=mixup)
    seen = {}

    def loss(logits, targets):
        seen["targets"] = targets
        return logits.sum()

    monkeypatch.setattr(task, "loss", loss)
    images = torch.randn(4, 3, 16, 16)
    batch = {"images": images.clone(), "labels": torch.tensor([0, 1, 2, 2])}
    task.training_loss(batch)
    share = float(seen["targets"][0, 0])
    assert 0 < share < 1
    # The pairs are an image and its mirror place in the batch.
    assert seen["targets"][0, 2] == pytest.approx(1 - share)
    assert seen["targets"][1].tolist() == pytest.approx([0, share, 1 - share])
    expected = share * images[0] + (1 - share) * images[3]
    torch.testing.assert_close(batch["images"][0], expected)


def test_odd_batches_cannot_be_mixed(folder, tmp_path):
    task = ImageClassifier(
        num_classes=3, model_options=tiny_vit(), mixup=MixupConfig(cutmix_alpha=1.0)
    )
    data = ImageDataModule(source=str(folder), batch_size=5)
    with pytest.raises(ValueError, match="mixup needs an even batch_size, got 5"):
        quiet_trainer(tmp_path).fit(task, datamodule=data)


def test_layer_decay_and_memory_saving_reach_the_model(folder, tmp_path):
    task = ImageClassifier(
        num_classes=3,
        model_options={**tiny_vit(), "num_layers": 2},
        optimization={"lr": 1.0, "layer_decay": 0.5},
        memory_saving=MemorySaving(chunk_size=None),
    )
    trainer = quiet_trainer(tmp_path, max_steps=1)
    trainer.fit(task, datamodule=ImageDataModule(source=str(folder), batch_size=6))
    rates = {group["initial_lr"] for group in trainer.optimizers[0].param_groups}
    # Stem, two blocks, head.
    assert rates == {0.125, 0.25, 0.5, 1.0}
    assert task.model.stack.blocks[0].memory_saving == MemorySaving(chunk_size=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs mixup_alpha or cutmix_alpha, got 0 for both"),
        ({"mixup_alpha": -1.0}, "mixup_alpha must be 0 or more, got -1.0"),
        ({"mixup_alpha": 1.0, "prob": 2.0}, r"prob must be in \[0, 1\], got 2.0"),
    ],
)
def test_bad_mixing_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MixupConfig(**options)
