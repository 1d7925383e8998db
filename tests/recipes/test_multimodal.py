"""The recipe: training, the table of all sets of modalities, the picture, and what is missing."""

import json

import pytest
import torch

from recipes.multimodal import MultimodalClassifier, main, restricted
from recipes.multimodal_data import MultimodalDataModule
from recipes.multimodal_figures import SceneExample, scenes_figure
from recipes.multimodal_scenes import SceneConfig
from tests.recipes.classification_runs import quiet_trainer
from tests.recipes.text_runs import curve, last_checkpoint_every

OWN = {"segment_lengths": [8], "dilation_rates": [1], "num_layers": 0}
MODALITIES = [
    {"kind": "frames", "name": "video", "img_size": 8, "patch_size": 8, "in_chans": 1, **OWN},
    {
        "kind": "audio",
        "name": "audio",
        "sample_rate": 4000,
        "window_size": 400,
        "hop_size": 400,
        "num_mels": 8,
        "conv_strides": [2],
        **OWN,
    },
    {"kind": "text", "name": "text", **OWN},
]
MODEL = {
    "embed_dim": 16,
    "num_layers": 1,
    "num_heads": 2,
    "ffn_dim": 24,
    "segment_lengths": [16, 48],
    "dilation_rates": [1, 3],
    "modalities": MODALITIES,
}
NAMES = ("video", "audio", "text")


def arguments(run_dir, **changes):
    options = {
        "trainer__accelerator": "cpu",
        "trainer__max_epochs": 1,
        "trainer__log_every_n_steps": 1,
        "trainer__default_root_dir": run_dir,
        "model__optimization__lr": 0.01,
        "data__batch_size": 4,
        "data__scenes__families": ["tabla", "drum"],
        "data__scenes__num_moments": 2,
        "data__scenes__num_train": 8,
        "data__scenes__num_val": 2,
        "data__scenes__num_test": 4,
    }
    options |= {f"model__model_options__{name}": value for name, value in MODEL.items()}
    options |= changes
    return [f"--{name.replace('__', '.')}={value}" for name, value in options.items()]


REPORT = ["--trainer.callbacks+=recipes.classification_report.ClassificationReport"]


def test_fit_test_and_predict(tmp_path, capsys):
    run_dir = tmp_path / "run"
    main(["fit", *arguments(run_dir), *last_checkpoint_every(2), *REPORT])
    out = capsys.readouterr().out
    table = [line.split("  ")[0].strip() for line in out.split("\ntest ")[1].splitlines()[1:9]]
    sets = ["video + audio + text", "video + audio", "video + text", "audio + text", *NAMES]
    assert table == [*sets, "chance"]
    record = json.loads((run_dir / "metrics.json").read_text())
    assert list(record["comparison"]["test"]) == sets
    whole = record["comparison"]["test"]["video + audio + text"]["accuracy"]
    assert whole == pytest.approx(record["metrics"]["test_accuracy"])
    assert (run_dir / "test_examples.png").stat().st_size > 20000
    assert f"Examples     {run_dir / 'test_examples.png'}\n" in out
    assert set(curve(run_dir, "val_skipped").values()) == {0.0}
    main(["test", *arguments(run_dir)])
    assert "video + audio + text" in capsys.readouterr().out
    main(["predict", *arguments(run_dir)])
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines() if "\t" in line]
    assert len(lines) == 4
    assert all("Digit while" in line[0] and line[1] in "0123456789" for line in lines)


def test_resumed_run_equals_an_unbroken_one(tmp_path):
    options = {"model__model_options__modality_dropout": 0.3, "trainer__max_epochs": 2}
    saved = [
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
        f"--trainer.callbacks.dirpath={tmp_path}",
        "--trainer.callbacks.every_n_train_steps=3",
        "--trainer.callbacks.save_top_k=-1",
    ]
    main(["fit", *arguments(tmp_path / "whole", **options), *saved])
    (checkpoint,) = tmp_path.glob("*step=3.ckpt")
    rest = [*arguments(tmp_path / "rest", **options), f"--ckpt_path={checkpoint}"]
    main(["fit", *rest, *saved])
    expected = curve(tmp_path / "whole", "train_loss")
    assert len(expected) == 4
    found = curve(tmp_path / "rest", "train_loss")
    assert found == {step: loss for step, loss in expected.items() if step >= 3}


def data_and_task(modalities=MODALITIES, **options):
    task = MultimodalClassifier(model_options={**MODEL, "modalities": modalities})
    sizes = {"num_train": 8, "num_val": 4, "num_test": 6}
    scenes = SceneConfig(families=("tabla", "drum"), num_moments=2, **sizes)
    data = MultimodalDataModule(scenes=scenes, batch_size=6, **options)
    data.setup("test", model=task.model)
    return data, task.eval()


def test_table_is_of_models_that_never_saw_the_rest():
    data, task = data_and_task()
    (batch,) = data.test_dataloader()
    only = restricted(batch, ("video",))
    assert list(only["inputs"]) == ["video"]
    assert set(only["times"]) == {"video"}
    torch.testing.assert_close(
        task.logits(only), task.model({"video": batch["inputs"]["video"]}, times=batch["times"])
    )
    assert (task.logits(only) - task.logits(batch)).abs().max() > 1e-4
    batch["present"]["audio"] = [True, False, True, False, False, False]
    heard = restricted(batch, ("audio",))
    assert torch.equal(heard["labels"], batch["labels"][[0, 2]])
    assert heard["names"] == [batch["names"][0], batch["names"][2]]
    batch["present"]["audio"] = [False] * 6
    assert restricted(batch, ("audio",)) is None


def test_a_model_of_two_modalities_gets_two(tmp_path):
    data, task = data_and_task(MODALITIES[::2])
    (batch,) = data.test_dataloader()
    assert list(batch["inputs"]) == ["video", "text"]
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(task.train(), datamodule=data)
    assert trainer.global_step == 1


def test_checkpoint_makes_the_model_again(tmp_path):
    data, task = data_and_task()
    trainer = quiet_trainer(tmp_path, max_steps=1)
    trainer.fit(task.train(), datamodule=data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = MultimodalClassifier.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert loaded.model.config == task.model.config
    (batch,) = data.test_dataloader()
    assert torch.equal(loaded.eval().logits(batch), task.eval().logits(batch))


def test_splits_share_no_digit_and_no_recording():
    data, _ = data_and_task()
    for parts in (
        [set(images.names) for images in data._images.values()],
        [{sound.path for sound in own} for own in data._recordings.values()],
    ):
        assert all(parts)
        assert len(set.union(*parts)) == sum(map(len, parts))


def test_picture_shows_strip_sound_question_answer_and_attention():
    weights = {(a, b): torch.rand(3, 4) for a in NAMES for b in NAMES}
    options = {
        "frames": torch.rand(2, 1, 8, 8) * 255,
        "log_mel": torch.randn(20, 8),
        "seconds": 2.0,
        "moment_seconds": 1.0,
        "families": ("tabla", "drum"),
        "question": "Which digit when drum sounds?",
        "true": "3",
        "predicted": "5",
        "probability": 0.7,
        "weights": weights,
        "times": {"video": torch.tensor([0.2, 0.4, 1.5, 1.7])},
    }
    silent = {**options, "frames": None, "log_mel": None, "times": {}, "predicted": "3"}
    figure = scenes_figure([SceneExample(**options), SceneExample(**silent)], title="Scenes")
    texts = [text.get_text() for text in figure.findobj(match=lambda x: hasattr(x, "get_text"))]
    assert any("Which digit when drum sounds?" in t and "5 (70%), but it is 3" in t for t in texts)
    assert {"tabla", "drum", "video → video", "attends to"} <= set(texts)
    share = weights["text", "audio"].sum(-1).mean()
    assert f"{float(share):.0%}" in texts


def test_picture_keeps_colours_and_has_room_for_long_names():
    names = ("camera_of_the_left_eye", "microphone_of_the_room", "text")
    frames = torch.full((2, 3, 8, 8), 51.0)
    example = SceneExample(
        frames=frames,
        log_mel=torch.randn(20, 8),
        seconds=2.0,
        moment_seconds=1.0,
        families=("ambience_of_a_town" * 3, "drum"),
        question="What is seen while " + "somebody talks " * 20,
        true="class" * 20,
        predicted="other" * 20,
        probability=0.7,
        weights={(a, b): torch.rand(3, 4) for a in names for b in names},
        times={name: torch.tensor([0.2, 0.4, 1.5, 1.7]) for name in names[:2]},
    )
    figure = scenes_figure([example], title="Scenes")
    figure.canvas.draw()
    strip, sound, *_ = figure.subfigs[0].subfigs[0].axes
    assert torch.from_numpy(strip.images[0].get_array().data).eq(0.2).all()
    assert sound.get_window_extent().width > figure.bbox.width / 2
    assert strip._left_title.get_window_extent().x1 < figure.bbox.x1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 1.0}, r"val_fraction must be in \[0, 1\), got 1.0"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"max_seconds": 0.0}, "max_seconds must be positive, got 0.0"),
        ({"on_error": "stop"}, "'skip' or 'raise', got 'stop'"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MultimodalDataModule(**options)


def test_what_is_not_there_is_refused():
    with pytest.raises(ValueError, match="must be a multimodal model, got 'longnet_lm_tiny'"):
        MultimodalClassifier(model_name="longnet_lm_tiny")
    data = MultimodalDataModule(source="a-{000..001}.tar")
    _, task = data_and_task()
    data.setup("fit", model=task.model)
    assert data.val_dataloader() == []
    with pytest.raises(ValueError, match="names of their classes, got class_names=None"):
        data.train_dataloader()
    with pytest.raises(ValueError, match=r"source='a-\{000..001\}.tar', .*shards.test=None"):
        data.test_dataloader()
