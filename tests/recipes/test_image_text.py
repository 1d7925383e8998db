import json
import re
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import normalize

from longnet_zoo.image_text import zero_shot_classifier
from longnet_zoo.layers import MemorySaving
from longnet_zoo.ops.contrastive import contrastive_loss
from recipes.classification_metrics import UNLABELLED
from recipes.image_text import ImageTextMatcher, main
from recipes.image_text_data import ImageTextDataModule
from recipes.image_text_report import ImageTextReport, score_table
from recipes.image_text_scores import Gallery
from recipes.image_text_sources import TableColumns
from recipes.shard_sources import HeldOutShardConfig
from tests.recipes.classification_runs import quiet_trainer
from tests.recipes.image_text_runs import tiny_model, tiny_options, write_table
from tests.recipes.text_runs import curve, last_checkpoint_every

REPORT = ["--trainer.callbacks+=recipes.image_text_report.ImageTextReport"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("pairs"), per_colour=16)


def arguments(folder, run_dir, **changes):
    options = {
        "trainer__accelerator": "cpu",
        "trainer__max_epochs": 4,
        "trainer__log_every_n_steps": 1,
        "trainer__default_root_dir": run_dir,
        "model__model_options": json.dumps(tiny_options()),
        "model__optimization__lr": 0.01,
        "data__source": folder,
        "data__columns__label": "colour",
        "data__val_fraction": 0.15,
        "data__test_fraction": 0.3,
        "data__batch_size": 8,
    }
    options |= changes
    return [f"--{name.replace('__', '.')}={value}" for name, value in options.items()]


def task(**options):
    return ImageTextMatcher(model_options=tiny_options(), **options)


def data(folder, **options):
    defaults = {"columns": TableColumns(label="colour"), "batch_size": 8}
    defaults |= {"val_fraction": 0.15, "test_fraction": 0.3}
    return ImageTextDataModule(source=str(folder), **(defaults | options))


def test_fit_test_and_predict(folder, tmp_path, capsys):
    run_dir = tmp_path / "run"
    options = arguments(folder, run_dir, trainer__max_epochs=10)
    main(["fit", *options, *last_checkpoint_every(5), *REPORT])
    out = capsys.readouterr().out
    rows = {line.split("  ")[0]: line for line in out.splitlines()}
    assert {"chance", "bag of pixels", "longnet_clip_tiny"} <= rows.keys()
    record = json.loads((run_dir / "metrics.json").read_text())["metrics"]
    # Captions hold the colour, and a number that no picture shows.
    assert record["test_zero_shot_accuracy"] > 0.8
    assert record["zero_shot_chance"] == pytest.approx(1 / 3)
    assert record["test_recall@5"] > record["chance_recall@5"] > 0
    # Grey images do not tell these colours apart.
    assert 0 <= record["bag_of_pixels_recall@5"] < record["test_recall@5"]
    assert f"{record['test_image_to_text_recall@5']:.1%}" in rows["longnet_clip_tiny"]
    for name in ("retrieval", "pattern"):
        assert (run_dir / f"{name}.png").stat().st_size > 5000
    losses = list(curve(run_dir, "train_loss").values())
    assert losses[-1] < 0.9 * losses[0]
    assert set(curve(run_dir, "val_skipped").values()) == {0.0}
    assert set(curve(run_dir, "train_truncated").values()) == {0.0}
    assert len(curve(run_dir, "val_recall@5")) == 10
    assert max(curve(run_dir, "logit_scale").values()) <= 100

    (run_dir / "metrics.json").write_text('{"metrics": {"steps": 3}}')
    main(["test", *options])
    tested = json.loads((run_dir / "metrics.json").read_text())["metrics"]
    assert tested["test_recall@5"] == pytest.approx(record["test_recall@5"])
    assert tested["test_loss"] == pytest.approx(record["test_loss"])
    assert tested["steps"] == 3
    capsys.readouterr()
    main(["predict", *options, f"--data.predict_source={folder}", '--data.queries=["blue","red"]'])
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines() if "\t" in line]
    assert [line[0] for line in lines] == ["blue", "red"]
    for (_, found), number in zip(lines, (2, 0), strict=True):
        numbers = [int(name) for name in re.findall(r"(\d+).png", found)]
        assert len(numbers) == 5
        assert sum(n % 3 == number for n in numbers) >= 4
    assert (run_dir / "queries.png").stat().st_size > 5000


def test_what_is_skipped_is_counted_and_nothing_to_search_is_said(folder, tmp_path, capsys):
    damaged = write_table(tmp_path / "pairs", per_colour=16, row3={"caption": ""})
    (damaged / "06.png").write_bytes(b"")
    run_dir = tmp_path / "run"
    held_out = {"data__val_fraction": 0.0, "data__test_fraction": 0.0}
    options = arguments(damaged, run_dir, trainer__max_epochs=1, **held_out)
    main(["fit", *options])
    assert "skipped 2 of 50 pairs in training; the log says which" in capsys.readouterr().out
    search = ["predict", *options, f"--data.predict_source={damaged / '06.png'}"]
    with pytest.raises(SystemExit):
        main(search)
    assert "found by sentences, got predict_source='" in capsys.readouterr().err
    main([*search, '--data.queries=["red"]'])
    out = capsys.readouterr().out
    assert "Nothing to search: no image could be read." in out
    assert "skipped 1 of 1 pairs in prediction; the log says which" in out
    assert not (run_dir / "queries.png").exists()


def test_report_is_on_validation_where_the_test_is_limited_to_nothing(folder, tmp_path, capsys):
    options = {"trainer__limit_test_batches": 0, "trainer__logger": "false"}
    main(["fit", *arguments(folder, tmp_path / "run", trainer__max_epochs=1, **options), *REPORT])
    out = capsys.readouterr().out
    assert "validation pairs" in out
    assert f"Checkpoint   {tmp_path / 'run/checkpoints/last.ckpt'}" in out
    # Nothing is listed that is not there.
    assert "metrics.csv" not in out
    assert (tmp_path / "run/retrieval.png").is_file()


def test_a_test_that_fails_does_not_cost_the_training(folder, tmp_path, capsys, monkeypatch):
    def fail(self):
        raise ValueError("test shards are gone")

    monkeypatch.setattr(ImageTextDataModule, "test_dataloader", fail)
    run_dir = tmp_path / "run"
    with pytest.raises(ValueError, match="test shards are gone"):
        main(["fit", *arguments(folder, run_dir, trainer__max_steps=3), *REPORT])
    saved = torch.load(run_dir / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 3


def saved_at_step_4(folder):
    return [
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
        f"--trainer.callbacks.dirpath={folder}",
        "--trainer.callbacks.every_n_train_steps=4",
        "--trainer.callbacks.save_top_k=-1",
    ]


@pytest.fixture(scope="module")
def whole_run(folder, tmp_path_factory):
    """Two epochs of three steps, by one process, and without a break."""
    run_dir = tmp_path_factory.mktemp("whole")
    main(["fit", *arguments(folder, run_dir, trainer__max_steps=6), *saved_at_step_4(run_dir)])
    return run_dir


def test_resumed_run_has_the_same_curve(folder, whole_run, tmp_path):
    (checkpoint,) = whole_run.glob("*step=4.ckpt")
    rest = [*arguments(folder, tmp_path, trainer__max_steps=6), *saved_at_step_4(whole_run)]
    main(["fit", *rest, f"--ckpt_path={checkpoint}"])
    for name in ("train_loss", "grad_norm", "lr", "val_loss"):
        expected = curve(whole_run, name)
        assert curve(tmp_path, name) == {i: x for i, x in expected.items() if i >= 4}
    assert len(curve(whole_run, "train_loss")) == 6


def test_icons_are_the_default_and_pages_of_them_are_long(tmp_path):
    module = ImageTextDataModule(batch_size=4, pages=2)
    model = tiny_model(image={**tiny_options()["image"], "img_size": 32})
    module.setup("fit", model=model)
    batch = next(iter(module.train_dataloader()))
    assert batch["images"].shape == (4, 3, 32, 32)
    assert all(caption.count("; ") == 3 for caption in batch["captions"])
    # The model takes 64 tokens.
    assert int(batch["num_truncated"]) == sum(len(c.encode()) > 63 for c in batch["captions"])
    assert module.class_names == ()
    plain = ImageTextDataModule(batch_size=4)
    plain.setup("fit", model=model)
    assert len(plain.class_names) == 20
    assert torch.isfinite(model.contrastive_loss(batch["images"], batch["tokens"]))


def test_held_out_pairs_do_not_depend_on_the_seed(folder):
    found = []
    for seed in (0, 1):
        module = data(folder, seed=seed)
        module.setup("fit", model=tiny_model())
        found.append(list(module.test_dataloader()))
    for a, b in zip(*found, strict=True):
        assert a["names"] == b["names"]
        assert torch.equal(a["images"], b["images"])


def test_files_are_cropped_in_training_only(folder):
    module = data(folder, crop_scale=(0.1, 0.2))
    module.setup("fit", model=tiny_model())
    whole = data(folder, crop_scale=(1.0, 1.0))
    whole.setup("fit", model=tiny_model())
    small, full = (next(iter(m.train_dataloader()))["images"] for m in (module, whole))
    # A small part is smoother.
    steps = [images.diff(dim=-1).abs().mean() for images in (small, full)]
    assert steps[0] < 0.7 * steps[1]
    a, b = (next(iter(m.test_dataloader()))["images"] for m in (module, whole))
    assert torch.equal(a, b)


def test_pixels_undo_the_normalisation(folder):
    module = data(folder)
    module.setup("fit", model=tiny_model())
    (batch,) = module.eval_loader("test", limit=1, is_shared=False)
    pixels = module.pixels(batch["images"])[0]
    assert pixels.shape == (16, 16, 3)
    number = int(batch["captions"][0].split()[1])
    assert pixels.mean((0, 1)).argmax() == number % 3
    assert pixels.mean((0, 1)).max() == pytest.approx(200 / 255, abs=0.03)


def test_classes_are_known_by_the_prompts_of_the_data(folder, monkeypatch):
    module = data(folder, prompts=["a {} dot", "{} it is"])
    model = task()
    module.setup("fit", model=model.model)
    monkeypatch.setattr(model, "_trainer", SimpleNamespace(datamodule=module))
    classes = []
    for name in ("blue", "green", "red"):
        texts = model.encode_texts([f"a {name} dot", f"{name} it is"])
        classes.append(normalize(texts.mean(0), dim=0))
    asked = []
    monkeypatch.setattr(
        "recipes.image_text.zero_shot_classifier",
        lambda *args: asked.append(zero_shot_classifier(*args)) or asked[0],
    )
    labels = torch.tensor([0, 1, 2, 2, UNLABELLED])
    images = torch.stack([classes[i] for i in (0, 1, 2, 0, 1)])
    gallery = Gallery(
        image_features=images,
        text_features=images,
        image_ids=torch.arange(5),
        text_ids=torch.arange(5),
        labels=labels,
    )
    scores = model.eval().score(gallery)
    assert torch.allclose(asked[0], torch.stack(classes, dim=1), atol=1e-5)
    # The fourth is a blue one that is said to be red; the last one does not count.
    assert scores["zero_shot_accuracy"] == 3 / 4


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_loss_is_the_models_and_equal_captions_are_no_opposites(folder, loss):
    model = ImageTextMatcher(model_options={**tiny_options(), "loss": loss}, loss_chunk_size=3)
    assert model.model.config.loss == loss
    module = data(folder)
    module.setup("fit", model=model.model)
    batch = next(iter(module.train_dataloader()))
    batch["text_ids"] = torch.tensor([1, 1, 2, 3, 4, 5, 6, 7])
    found = model.loss(batch)
    images = model.model.encode_image(batch["images"], normalize=True)
    texts = model.model.encode_text(batch["tokens"], normalize=True)
    options = {"bias": model.model.logit_bias, "kind": loss}
    expected = contrastive_loss(
        images, texts, model.model.scale(), labels=batch["text_ids"], **options
    )
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    without = contrastive_loss(images, texts, model.model.scale(), **options)
    assert found.item() != pytest.approx(without.item(), rel=1e-5)


def test_memory_saving_reaches_both_towers():
    saving = task(memory_saving=MemorySaving(chunk_size=2)).model
    plain = task().model
    assert [m.memory_saving for m in saving.modules() if hasattr(m, "memory_saving")] != [
        m.memory_saving for m in plain.modules() if hasattr(m, "memory_saving")
    ]


def test_run_can_be_loaded_from_python(folder, tmp_path):
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    model = task(memory_saving={"chunk_size": 4}, optimization={"lr": 0.002})
    trainer.fit(model, data(folder))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    loaded = ImageTextMatcher.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    assert loaded.optimization.lr == 0.002
    assert loaded.model.config == model.model.config
    for name, value in model.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value)


def test_damaged_pairs_are_counted_in_the_log(tmp_path):
    folder = write_table(tmp_path / "pairs", per_colour=8, row2={"caption": ""})
    (folder / "05.png").write_bytes(b"cut")
    run_dir = tmp_path / "run"
    shorter = json.dumps({**tiny_options(), "max_text_len": 6})
    options = arguments(folder, run_dir, data__val_fraction=0, data__test_fraction=0)
    main(["fit", *options, "--trainer.max_epochs=1", f"--model.model_options={shorter}"])
    assert curve(run_dir, "train_skipped") == {2: 2.0}
    assert next(iter(curve(run_dir, "train_truncated").values())) > 5


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_without_a_test_the_report_is_of_the_validation(folder, tmp_path, capsys):
    def fit(module):
        callbacks = [ImageTextReport(title="Dots")]
        trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=callbacks)
        trainer.fit(task(), module)
        return capsys.readouterr().out

    module = data(folder, test_fraction=0.0)
    assert "validation pairs" in fit(module)
    metrics = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    assert "val_recall@5" in metrics
    nothing = data(folder, test_fraction=0, val_fraction=0)
    assert "No report: nothing that is held out" in fit(nothing)
    with pytest.raises(ValueError, match=r"the test needs pairs, .*test_fraction=0.0 and"):
        module.test_dataloader()


def test_report_without_the_baseline(folder, tmp_path, capsys):
    trainer = quiet_trainer(
        tmp_path, max_epochs=1, callbacks=[ImageTextReport(title="Dots", max_baseline_pairs=0)]
    )
    trainer.fit(task(), data(folder))
    out = capsys.readouterr().out
    assert "Dots: " in out
    assert "bag of pixels" not in out
    metrics = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    assert not any(name.startswith("bag_of_pixels") for name in metrics)
    assert metrics["chance_recall@5"] > 0
    with pytest.raises(ValueError, match="max_baseline_pairs must be 0 or more, got -1"):
        ImageTextReport(max_baseline_pairs=-1)


def test_table_has_a_row_for_each_method():
    scores = {
        f"{direction}_recall@{k}": k / (200 if direction == "text_to_image" else 50)
        for direction in ("text_to_image", "image_to_text")
        for k in (1, 5, 10)
    }
    lines = score_table({"chance": scores, "a long name": scores}).splitlines()
    assert lines[1].split() == ["recall", "@1", "@5", "@10", "@1", "@5", "@10"]
    assert lines[3].split()[-6:] == ["0.5%", "2.5%", "5.0%", "2.0%", "10.0%", "20.0%"]
    assert len({len(line) for line in lines[1:]}) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 1}, "batch_size must be 2 or more, got 1"),
        ({"eval_batch_size": 0}, "eval_batch_size must be 1 or more, got 0"),
        ({"pages": -1}, "pages must be 0 or more, got -1"),
        ({"queries": ["a bell", " "]}, r"queries must not be blank, got \['a bell', ' '\]"),
        ({"val_fraction": 1.0}, r"val_fraction must be in \[0, 1\), got 1.0"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "got 0.5 and 0.5"),
        ({"on_error": "stop"}, "on_error must be .skip. or .raise., got .stop."),
        ({"long_captions": "cut"}, "long_captions must be .truncate. or .refuse., got .cut."),
        ({"prompts": ["a photo"]}, r"prompts must hold {} for the class, got \['a photo'\]"),
        ({"prompts": []}, r"prompts must hold {} for the class, got \[\]"),
        ({"crop_scale": (0.5, 1.0)}, r"null for icons.*got \(0.5, 1.0\) and source='icons'"),
        ({"crop_scale": (0.5, 1.5), "source": "x"}, r"got \(0.5, 1.5\) and source='x'"),
        ({"pages": 2, "source": "x"}, "pages are made of icons, got pages=2 and 'x'"),
        (
            {"shards": HeldOutShardConfig(val="v.tar")},
            "source of shards, got 'v.tar', None and source=",
        ),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ImageTextDataModule(**options)


def test_what_does_not_fit_the_model_is_refused(folder, tmp_path):
    wide = tiny_model(image={**tiny_options()["image"], "img_size": [16, 24]})
    with pytest.raises(ValueError, match="got a model for images of 16 x 24 pixels"):
        ImageTextDataModule().setup("fit", model=wide)
    few = tiny_model(text={**tiny_options()["text"], "vocab_size": 100}, pad_id=7)
    with pytest.raises(ValueError, match=r"259 ids and padding 258.*vocab_size=100 and pad_id=7"):
        data(folder).setup("fit", model=few)
    with pytest.raises(ValueError, match="must be an image-text model, got 'longnet_lm_tiny'"):
        ImageTextMatcher(model_name="longnet_lm_tiny")
    with pytest.raises(ValueError, match="loss_chunk_size must be 1 or more, got 0"):
        task(loss_chunk_size=0)
    only = write_table(tmp_path, per_colour=1, **{f"row{i}": {"split": "test"} for i in (1, 2, 3)})
    with pytest.raises(ValueError, match=r"training needs pairs, got none in .*val_fraction=0.15"):
        data(only).setup("fit", model=tiny_model())


# The forked processes take this over: there Lightning calls PyTorch by names that are deprecated.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_as_one(folder, whole_run, tmp_path):
    two = arguments(folder, tmp_path, trainer__max_steps=3, data__batch_size=4)
    two += ["--model.optimization.decay_steps=6"]
    main(["fit", *two, "--trainer.devices=2", "--trainer.strategy=ddp_fork"])
    for name in ("train_loss", "val_loss", "val_recall@5"):
        expected = {i: x for i, x in curve(whole_run, name).items() if i < 3}
        assert curve(tmp_path, name) == pytest.approx(expected, rel=1e-4)
