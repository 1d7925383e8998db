import numpy as np
import pytest
import torch
from PIL import Image

import longnet_zoo as lz
from recipes.image_data import AugmentationConfig, ImageDataModule
from tests.recipes.classification_runs import CLASSES, tiny_vit, write_images


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "images", per_class=12)


@pytest.fixture
def model():
    return lz.create_model("longvit_tiny_patch8_64", **tiny_vit())


def made(model, folder, stage="fit", **options):
    data = ImageDataModule(source=str(folder), **{"batch_size": 4, **options})
    data.setup(stage, model=model)
    return data


def test_images_have_the_models_size_and_normalisation(model, folder):
    data = made(model, folder)
    assert data.class_names == tuple(sorted(CLASSES))
    (name, image) = next((batch["names"][0], batch["images"][0]) for batch in data.val_dataloader())
    with Image.open(name) as file:
        expected = file.convert("RGB").resize((16, 16), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.asarray(expected).copy()).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (expected - mean[:, None, None]) / std[:, None, None]
    # The whole image, squashed, as LongViT's slides were.
    torch.testing.assert_close(image, expected, atol=1e-5, rtol=1e-5)


def test_data_config_overrules_the_models(model, folder):
    config = {"input_size": [3, 24, 8], "mean": [0.5, 0.5, 0.5], "std": [1.0, 1.0, 1.0]}
    data = made(model, folder, data_config=config)
    images = next(iter(data.val_dataloader()))["images"]
    assert images.shape[1:] == (3, 24, 8)
    assert float(images.min()) >= -0.5
    assert float(images.max()) <= 0.5
    assert next(iter(data.train_dataloader()))["images"].shape[1:] == (3, 24, 8)


def test_grey_models_are_refused(folder):
    model = lz.create_model("longvit_tiny_patch8_64", in_chans=1, **tiny_vit())
    with pytest.raises(ValueError, match=r"input_size=\(1, 16, 16\). Use in_chans=3"):
        made(model, folder)


def test_training_images_are_changed_and_others_are_not(model, folder):
    augmentation = AugmentationConfig(
        scale=(0.2, 0.5), auto_augment="rand-m9-mstd0.5-inc1", erasing=1.0, color_jitter=0.4
    )
    data = made(model, folder, augmentation=augmentation)
    kinds = [type(step).__name__ for step in data._transform(is_training=True).transforms]
    assert {"RandAugment", "RandomErasing", "RandomHorizontalFlip"} <= set(kinds)
    assert "RandomVerticalFlip" not in kinds
    first, second = (next(iter(data.val_dataloader())) for _ in range(2))
    assert torch.equal(first["images"], second["images"])


def test_flips_happen_as_often_as_asked(model, folder):
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0}
    size = {"data_config": {"input_size": [3, 20, 20]}, "batch_size": 24}

    def epoch(**changes):
        augmentation = AugmentationConfig(**{**whole, **changes})
        batch = next(
            iter(made(model, folder, augmentation=augmentation, **size).train_dataloader())
        )
        return dict(zip(batch["names"], batch["images"], strict=True))

    plain, mirrored, upside_down = epoch(), epoch(hflip=1.0), epoch(vflip=1.0)
    for name, image in plain.items():
        torch.testing.assert_close(mirrored[name], image.flip(2))
        torch.testing.assert_close(upside_down[name], image.flip(1))


def test_batches_have_their_sizes(model, folder):
    data = made(model, folder, batch_size=6, eval_batch_size=2, test_fraction=0.3)
    assert len(next(iter(data.train_dataloader()))["labels"]) == 6
    assert len(next(iter(data.test_dataloader()))["labels"]) == 2
    assert sum(data.class_counts) == len(data._images["train"])


def test_nothing_held_out(model, folder):
    data = made(model, folder, val_fraction=0.0, test_fraction=0.0)
    assert data.val_dataloader() == []
    assert not data.has_test
    with pytest.raises(ValueError, match=r"without a folder 'test' and test_fraction=0.0"):
        data.test_dataloader()


def test_prediction_needs_no_training_images(model, folder):
    data = ImageDataModule(source="nowhere", predict_source=str(folder / "red"), batch_size=5)
    data.setup("predict", model=model)
    assert data.class_names is None
    names = [name for batch in data.predict_dataloader() for name in batch["names"]]
    assert names == sorted(str(p) for p in (folder / "red").iterdir())
    # Without a folder of its own it takes the test images.
    data = made(model, folder, "predict")
    assert len(data.predict_dataloader()) == len(data.test_dataloader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 1.0}, r"val_fraction must be in \[0, 1\), got 1.0"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "got 0.5 and 0.5"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"eval_batch_size": 0}, "eval_batch_size must be 1 or more, got 0"),
        ({"num_workers": -1}, "num_workers must be 0 or more, got -1"),
        ({"on_error": "ignore"}, "on_error must be 'skip' or 'raise', got 'ignore'"),
        ({"data_config": {"size": 3}}, "data_config takes input_size, .*, got size"),
        (
            {"data_config": {"interpolation": "cubist"}},
            "data_config.interpolation must be one of nearest, .*, got 'cubist'",
        ),
        (
            {"data_config": {"crop_mode": "top"}},
            "data_config.crop_mode must be one of center, squash, border, got 'top'",
        ),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ImageDataModule(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": (0.0, 1.0)}, r"scale must be .* <= 1.0, got \(0.0, 1.0\)"),
        ({"scale": (0.5, 1.5)}, r"scale must be .* <= 1.0, got \(0.5, 1.5\)"),
        ({"ratio": (2.0, 1.0)}, r"ratio must be .*, got \(2.0, 1.0\)"),
        ({"hflip": 1.5}, r"hflip must be in \[0, 1\], got 1.5"),
        ({"color_jitter": -0.1}, "color_jitter must be 0 or more, got -0.1"),
        ({"auto_augment": "foo"}, "auto_augment must be a policy of timm, .*, got 'foo'"),
        ({"auto_augment": "rand-foo3"}, "auto_augment must be a policy .*, got 'rand-foo3'"),
    ],
)
def test_bad_augmentation_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AugmentationConfig(**options)
