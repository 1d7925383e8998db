"""timm's conventions, for every vision model that is registered with it."""

import pytest
import timm
import torch
from timm.data import create_transform, resolve_data_config
from timm.models import get_pretrained_cfg, is_model, list_pretrained
from torchvision.transforms.functional import to_pil_image

import longnet_zoo.timm_registry  # noqa: F401 - registers the models
from longnet_zoo.factory import create_model, list_models
from longnet_zoo.models import LongViT
from longnet_zoo.weights.longvit import CONVERTER
from tests.models.small_vision import CLASSES, EMBED_DIM, LAYERS, PATCH, SMALL, draw

NAMES = list_models(modality="vision")
SMALL_NAME = "longvit_small_patch32_1024"
# `SMALL` leaves no difference between the sizes of a kind.
KINDS = (SMALL_NAME, "longvit_tiny_patch8_64")


def make(name=SMALL_NAME, **options):
    return timm.create_model(name, **{**SMALL, **options})


def published_file(path, container="teacher", **options):
    """Saves a model with random values under the published names; returns it."""
    model = make(**{"img_size": 20, "num_classes": 0, **CONVERTER.options, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    published = CONVERTER.to_published(model)
    if container == "teacher":
        published |= {"head.mlp.0.weight": torch.zeros(2, 2)}
        published = {f"module.{key}": tensor for key, tensor in published.items()}
    torch.save({container: published, "epoch": 3}, path)
    return model.eval()


def load(path, **options):
    overlay = {"file": str(path), **options.pop("overlay", {})}
    options = {"img_size": 20, "num_classes": 0, **options}
    return make(pretrained=True, pretrained_cfg_overlay=overlay, **options).eval()


def test_every_vision_model_is_registered():
    assert len(NAMES) >= 6
    assert set(timm.list_models("longvit*")) == set(NAMES)
    assert all(is_model(name) for name in NAMES)
    assert set(list_pretrained("longvit_small*")) == {
        f"{name}.dino_tcga" for name in NAMES if name.startswith("longvit_small")
    }


@pytest.mark.parametrize("name", KINDS)
def test_creation_and_forward(name):
    model, images = make(name), draw()
    assert isinstance(model, LongViT)
    assert model.num_classes == CLASSES
    assert model(images).shape == (2, CLASSES)
    features = model.forward_features(images)
    assert features.shape == (2, 35, model.num_features)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert torch.equal(model.forward_head(features), model(images))


@pytest.mark.parametrize("name", NAMES)
def test_default_is_the_registered_config(name):
    options = {"img_size": 64, "num_layers": 1} if "small" in name else {}
    model, ours = timm.create_model(name, **options), create_model(name, **options)
    assert model.config == ours.config
    cfg = get_pretrained_cfg(name)
    side = int(name.rsplit("_", 1)[1])
    assert cfg.input_size == (3, side, side)
    assert model.pretrained_cfg is model.default_cfg
    assert model.default_cfg["architecture"] == name
    assert model.get_submodule(cfg.first_conv) is model.patch_embed.proj
    model.reset_classifier(3)
    assert model.get_submodule(cfg.classifier) is model.get_classifier()
    assert (cfg.num_classes, cfg.fixed_input_size, cfg.pool_size) == (0, False, None)
    if "small" in name:
        assert cfg.tag == "dino_tcga"
        assert cfg.url.endswith("/longvit_small_patch32_1024.pth")
        assert cfg.license == "mit"
    else:
        assert not cfg.has_weights


@pytest.mark.parametrize("name", NAMES)
def test_data_config_and_transform(name):
    for model in (make(name), create_model(name, **SMALL)):
        data = resolve_data_config(model.pretrained_cfg)
        assert data["mean"] == (0.485, 0.456, 0.406)
        assert data["std"] == (0.229, 0.224, 0.225)
        assert (data["crop_pct"], data["interpolation"]) == (1.0, "bicubic")
    data["input_size"] = (3, 28, 20)
    image = torch.randint(256, (3, 50, 61), dtype=torch.uint8)

    pixels = create_transform(**data)(to_pil_image(image))
    assert pixels.shape == (3, 28, 20)
    assert model(pixels[None]).shape == (1, CLASSES)


@pytest.mark.parametrize("name", KINDS)
def test_reset_classifier(name):
    model, images = make(name), draw()
    head = model.get_classifier()
    assert isinstance(head, torch.nn.Linear)
    features = model.forward_features(images)
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert not isinstance(model.get_classifier(), torch.nn.Linear)
    assert model(images).shape == (2, model.num_features)
    assert torch.equal(model.forward_head(features, pre_logits=True), model(images))
    model.reset_classifier(0, "")
    assert model.global_pool == ""
    assert torch.equal(model(images), features)
    model.reset_classifier(4, "avg")
    assert model(images).shape == (2, 4)


@pytest.mark.parametrize("name", KINDS)
def test_every_parameter_gets_a_gradient(name):
    model = make(name, final_norm=True)
    output = model(draw())
    (output * torch.randn_like(output)).sum().backward()
    without = [
        key for key, x in model.named_parameters() if x.grad is None or not x.grad.abs().sum() > 0
    ]
    assert not without


@pytest.mark.parametrize("name", KINDS)
def test_state_dict_round_trip(name, tmp_path):
    model, other, images = make(name), make(name), draw()
    assert not torch.equal(model(images), other(images))
    torch.save(model.state_dict(), tmp_path / "model.pth")
    timm.models.load_checkpoint(other, str(tmp_path / "model.pth"))
    assert torch.equal(model(images), other(images))


@pytest.mark.parametrize("name", KINDS)
def test_features_only(name):
    model = make(name, features_only=True, out_indices=(0, 2))
    images = draw()
    maps = model(images)
    assert model.feature_info.channels() == [EMBED_DIM, EMBED_DIM]
    assert model.feature_info.reduction() == [PATCH, PATCH]
    assert model.feature_info.module_name() == ["stack.blocks.0", "stack.blocks.2"]
    assert [x.shape for x in maps] == [(2, EMBED_DIM, 7, 5)] * 2
    assert all(x.isfinite().all() for x in maps)
    assert "num_classes" not in model.pretrained_cfg


@pytest.mark.parametrize("name", KINDS)
def test_features_only_takes_three_last_blocks_and_prunes_the_rest(name):
    model = make(name, features_only=True)
    assert len(model(draw())) == LAYERS
    model = make(name, features_only=True, out_indices=(0,))
    assert len(model.model.stack.blocks) == 1


@pytest.mark.parametrize("name", KINDS)
def test_intermediate_layers_are_those_of_forward_intermediates(name):
    model, images = make(name), draw()
    for norm in (False, True):
        expected = model.forward_intermediates(
            images, [0, 2], norm=norm, intermediates_only=True, output_fmt="NLC"
        )
        found = model.get_intermediate_layers(images, [0, 2], norm=norm)
        torch.testing.assert_close(found, expected, atol=0, rtol=0)
        maps = model.get_intermediate_layers(images, [0, 2], norm=norm, reshape=True)
        torch.testing.assert_close([x.flatten(2).mT for x in maps], expected, atol=0, rtol=0)


def test_options_of_the_issue_work_together():
    model = timm.create_model(
        SMALL_NAME,
        pretrained=False,
        num_classes=7,
        in_chans=1,
        img_size=512,
        features_only=True,
        out_indices=(3, 7, 11),
    )
    assert type(model).__name__ == "FeatureGetterNet"
    assert [x.shape for x in model(torch.randn(1, 1, 64, 96))] == [(1, 384, 2, 3)] * 3
    assert model.model.config.img_size == (512, 512)


def test_names_that_timm_gives_options_reach_ours():
    rates = {"drop_rate": 0.1, "proj_drop_rate": 0.2, "attn_drop_rate": 0.3, "drop_path_rate": 0.4}
    config = make(**rates, global_pool="", num_layers=2).config
    found = (config.head_dropout, config.dropout, config.attention_dropout, config.drop_path)
    assert found == (0.1, 0.2, 0.3, 0.4)
    assert (config.global_pool, config.num_layers) == ("", 2)
    with pytest.raises(TypeError, match="no option 'class_token'"):
        make(class_token=True)


@pytest.mark.parametrize("container", ["teacher", "module", "model"])
def test_published_file_takes_the_published_switches(container, tmp_path):
    final_norm = container == "teacher"
    saved = published_file(tmp_path / "x.pth", container, final_norm=final_norm)
    model, images = load(tmp_path / "x.pth", final_norm=final_norm), draw()
    assert (model.config.head_offset, model.config.padded_keys) == ("block", "zero")
    assert model.config == saved.config
    assert torch.equal(model(images), saved(images))
    new = make(img_size=20, num_classes=0, final_norm=final_norm).eval()
    new.load_state_dict(model.state_dict())
    assert not torch.allclose(new(images), model(images), atol=1e-3)


def test_switches_that_the_user_passes_win(tmp_path):
    published_file(tmp_path / "x.pth")
    model = load(tmp_path / "x.pth", padded_keys="ignore")
    assert (model.config.head_offset, model.config.padded_keys) == ("block", "ignore")


def test_own_file_keeps_the_switches_of_a_new_model(tmp_path, caplog):
    saved = make(img_size=20, num_classes=0).eval()
    torch.save(saved.state_dict(), tmp_path / "x.pth")
    model, images = load(tmp_path / "x.pth"), draw()
    assert model.config == saved.config
    assert "the model has head_offset='modulo', padded_keys='ignore'" in caplog.text
    assert torch.equal(model(images), saved(images))
    other = load(tmp_path / "x.pth", img_size=28)
    assert other.pos_embed.shape == (1, 49, EMBED_DIM)


def test_published_file_is_fitted_to_images_and_classes(tmp_path):
    saved = published_file(tmp_path / "x.pth")
    for in_chans in (1, 2, 5):
        model = load(tmp_path / "x.pth", img_size=28, in_chans=in_chans, num_classes=7)
        assert model(torch.randn(1, in_chans, 28, 28)).shape == (1, 7)
        expected = timm.models.adapt_input_conv(in_chans, saved.patch_embed.proj.weight)
        assert torch.equal(model.patch_embed.proj.weight, expected)
        assert model.pos_embed.shape == (1, 49, EMBED_DIM)
        q_proj = model.stack.blocks[1].attention.q_proj.weight
        assert torch.equal(q_proj, saved.stack.blocks[1].attention.q_proj.weight)


def test_head_of_a_classifier_is_kept_or_dropped_by_the_number_of_classes(tmp_path):
    saved, images = published_file(tmp_path / "x.pth", "module", num_classes=2), draw()
    overlay = {"num_classes": 2}
    same = load(tmp_path / "x.pth", overlay=overlay, num_classes=2)
    assert torch.equal(same(images), saved(images))
    other = load(tmp_path / "x.pth", overlay=overlay, num_classes=7)
    assert torch.equal(other.fc_norm.weight, saved.fc_norm.weight)
    assert other(images).shape == (2, 7)
    headless = load(tmp_path / "x.pth", overlay=overlay)
    assert torch.equal(headless.forward_features(images), saved.forward_features(images))


@pytest.mark.parametrize("how", ["published", "ours"])
def test_head_of_a_classifier_is_kept_without_a_word_of_its_classes(how, tmp_path):
    saved, images = published_file(tmp_path / "x.pth", "module", num_classes=2), draw()
    if how == "ours":
        torch.save(saved.state_dict(), tmp_path / "x.pth")
    same = load(tmp_path / "x.pth", num_classes=2, **CONVERTER.options)
    assert torch.equal(same(images), saved(images))
    assert get_pretrained_cfg(SMALL_NAME).num_classes == 0
    other = load(tmp_path / "x.pth", num_classes=7)
    assert torch.equal(other.fc_norm.weight, saved.fc_norm.weight)
    assert other(images).shape == (2, 7)
    headless = load(tmp_path / "x.pth", **CONVERTER.options)
    assert torch.equal(headless.forward_features(images), saved.forward_features(images))


@pytest.mark.parametrize("num_classes", [0, 3])
def test_own_file_with_keys_that_the_model_lacks_is_refused(num_classes, tmp_path):
    state_dict = make(img_size=20, num_classes=0, final_norm=True).state_dict()
    torch.save({**state_dict, "cls_token": torch.zeros(1)}, tmp_path / "x.pth")
    message = "have 3 keys that are not in this model: cls_token, norm.bias, norm.weight"
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "x.pth", num_classes=num_classes)


def test_published_file_gives_features_only(tmp_path):
    saved, images = published_file(tmp_path / "x.pth"), draw()
    model = load(tmp_path / "x.pth", features_only=True, out_indices=(1,), num_classes=3)
    expected = saved.forward_intermediates(images, [1], intermediates_only=True)
    torch.testing.assert_close(model(images), expected, atol=0, rtol=0)


def test_incomplete_weights_are_refused(tmp_path):
    published_file(tmp_path / "x.pth", num_layers=2)
    with pytest.raises(ValueError, match=r"weights lack 20 keys .*stack.blocks.2.attention"):
        load(tmp_path / "x.pth", num_classes=4)
    published_file(tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"lack 2 keys of this model: norm.bias, norm.weight"):
        load(tmp_path / "x.pth", final_norm=True, num_classes=4)


def test_saved_by_timm_and_loaded_again(tmp_path):
    published_file(tmp_path / "x.pth")
    model, images = load(tmp_path / "x.pth"), draw()
    args = {**SMALL, **model._model_args, "img_size": 20, "num_classes": 0}
    timm.models.save_for_hf(model, tmp_path / "saved", model_args=args)
    again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    assert again.config.head_offset == "block"
    assert torch.equal(again(images), model(images))
