from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from longnet_zoo import factory, registry
from longnet_zoo.factory import create_model, list_models, model_info
from longnet_zoo.models import LongNetLM, LongNetLMConfig, LongNetMLM
from longnet_zoo.registry import PublishedWeights, find_model, register_model
from longnet_zoo.weights import CONVERTERS, to_published_state_dict

SMALL = {
    "vocab_size": 61,
    "embed_dim": 24,
    "num_layers": 1,
    "num_heads": 4,
    "segment_lengths": (7, 16),
    "dilation_rates": (1, 3),
}
TRAINED = {"head_offset": "block", "padded_keys": "zero"}
# One small model of each family whose weights are published under other names.
SMALL_MODELS = {
    "gigapath_slide": ("gigapath_slide_enc12l768d", {"embed_dim": 32, "num_layers": 1}),
    "longnet_beit3": ("longnet_beit3_tiny", {"num_layers": 1}),
    "longnet_lm": ("longnet_lm_tiny", SMALL),
    "longnet_mlm": ("longnet_mlm_tiny", {**SMALL, "position": "xpos"}),
    "longvit": ("longvit_tiny_patch8_64", {"num_layers": 1}),
}


class OtherConfig(LongNetLMConfig):
    pass


class OtherLM(LongNetLM):
    config_class = OtherConfig


TOKENS = torch.arange(40).reshape(2, 20)


def test_options_change_the_config_and_the_rest_stays():
    model = create_model("longnet_lm_tiny", num_layers=1, dropout=0.25)
    assert isinstance(model, LongNetLM)
    default = asdict(find_model("longnet_lm_tiny").config)
    changed = {k: v for k, v in asdict(model.config).items() if v != default[k]}
    assert changed == {"num_layers": 1, "dropout": 0.25}
    assert isinstance(create_model("longnet_mlm_tiny", num_layers=1), LongNetMLM)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("longnet_lm_tny", {}, ValueError, "Did you mean 'longnet_lm_tiny'"),
        (
            "longnet_lm_tiny",
            {"num_head": 4},
            TypeError,
            r"longnet_lm_tiny has no option 'num_head'. Did you mean 'num_heads'.*"
            r"Options: embed_dim, num_layers, .*num_outputs, extra_branches\.",
        ),
        ("longnet_lm_tiny", {"qqq": 4}, TypeError, "no option 'qqq'. Options: embed_dim"),
        ("longnet_lm_tiny", {"is_causal": False}, TypeError, "no option 'is_causal'"),
        ("longnet_lm_tiny", {"num_heads": 2.0}, TypeError, r"num_heads must be .*got 2.0 \(float"),
        ("longnet_lm_tiny", {"num_heads": 5}, ValueError, "embed_dim=192 and num_heads=5"),
    ],
)
def test_unknown_names_and_wrong_options_are_refused(name, options, error, message):
    with pytest.raises(error, match=message):
        create_model(name, **options)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin", ".ckpt", None])
def test_weights_come_from_files_and_state_dicts(suffix, tmp_path):
    model = create_model("longnet_lm_tiny", **SMALL)
    pretrained = model.state_dict()
    if suffix == ".safetensors":
        pretrained = tmp_path / "model.safetensors"
        save_file(model.state_dict(), pretrained)
    elif suffix is not None:
        pretrained = str(tmp_path / f"model{suffix}")
        torch.save(model.state_dict(), pretrained)
    loaded = create_model("longnet_lm_tiny", pretrained=pretrained, **SMALL)
    assert torch.equal(loaded(TOKENS), model(TOKENS))


def test_published_weights_are_loaded_from_where_they_are_registered(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    model = create_model("longnet_lm_tiny", **SMALL)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    register_model(
        "longnet_lm_trained",
        config=model.config,
        family="longnet_lm",
        modality="text",
        description="a test",
        source="nowhere",
        weights=(
            PublishedWeights(tag="a", location=str(tmp_path / "w.safetensors"), licence="MIT"),
        ),
    )(LongNetLM)
    assert "longnet_lm_trained" in list_models("longnet_lm_*", pretrained=True)
    assert model_info("longnet_lm_trained").weights[0].licence == "MIT"
    for pretrained in (True, "a"):
        loaded = create_model("longnet_lm_trained", pretrained=pretrained)
        assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert not torch.equal(create_model("longnet_lm_trained")(TOKENS), model(TOKENS))


def test_weights_that_do_not_fit_are_refused_with_every_key():
    state = create_model("longnet_lm_tiny", **SMALL).state_dict()
    state["stack.norm.gain"] = state.pop("stack.norm.weight")
    state["embedding.weight"] = state["embedding.weight"][:60]
    with pytest.raises(ValueError, match="does not fit LongNetLM") as caught:
        create_model("longnet_lm_tiny", pretrained=state, **SMALL)
    for part in (
        r"1 missing (stack.norm.weight)",
        r"1 unexpected (stack.norm.gain)",
        r"1 of another shape (embedding.weight: (60, 24) instead of (61, 24))",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("pretrained", "error", "message"),
    [
        (True, ValueError, "no weights are published for 'longnet_lm_base'.*a state dict"),
        ("org/model", FileNotFoundError, "'org/model' does not exist: .*tags: none.*hf_hub:owner"),
        ("gone.safetensors", FileNotFoundError, "'gone.safetensors' does not exist"),
        (3, TypeError, "pretrained must be True, a tag, the path .*got int"),
        (None, TypeError, "pretrained must be True, a tag, the path .*got NoneType"),
    ],
)
def test_weights_that_are_not_there_are_refused(pretrained, error, message):
    with pytest.raises(error, match=message):
        create_model("longnet_lm_base", pretrained=pretrained, **SMALL)


@pytest.mark.parametrize("family", sorted(CONVERTERS))
def test_published_names_bring_the_options_they_were_trained_with(family):
    name, options = SMALL_MODELS[family]
    trained = CONVERTERS[family].options
    model = create_model(name, **{**options, **trained})
    published = to_published_state_dict(model)
    assert published.keys() != model.state_dict().keys()
    loaded = create_model(name, pretrained=published, **options)
    assert loaded.config == model.config
    for key, x in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], x), key


def test_users_options_win_over_those_of_published_weights():
    model = create_model("longnet_lm_tiny", head_offset="block", **SMALL)
    published = to_published_state_dict(create_model("longnet_lm_tiny", **SMALL, **TRAINED))
    kept = create_model("longnet_lm_tiny", pretrained=published, padded_keys="ignore", **SMALL)
    assert kept.config == model.config
    # Our names bring nothing.
    loaded = create_model("longnet_lm_tiny", pretrained=model.state_dict(), **SMALL)
    assert (loaded.config.head_offset, loaded.config.padded_keys) == ("modulo", "ignore")


def test_options_of_registered_weights_win_over_those_of_their_names(tmp_path, monkeypatch):
    model = create_model("longnet_lm_tiny", **SMALL, **TRAINED)
    torch.save({"model": to_published_state_dict(model)}, tmp_path / "w.pth")
    weights = PublishedWeights(
        tag="a",
        location=str(tmp_path / "w.pth"),
        licence="MIT",
        options={**SMALL, "head_offset": "modulo", "dropout": 0.5},
    )
    entry = replace(find_model("longnet_lm_tiny"), weights=(weights,))
    monkeypatch.setitem(registry._ENTRIES, "longnet_lm_tiny", entry)
    config = create_model("longnet_lm_tiny", pretrained="a", dropout=0.25).config
    assert (config.head_offset, config.padded_keys, config.dropout) == ("modulo", "zero", 0.25)


def test_folder_of_save_pretrained_brings_its_config(tmp_path):
    model = create_model("longnet_lm_tiny", **SMALL, **TRAINED, num_outputs=0)
    model.save_pretrained(tmp_path)
    for place in (tmp_path, tmp_path / "model.safetensors"):
        options = {"embed_dim": 24, "num_layers": 1, "num_heads": 2, "dropout": 0.5}
        with pytest.warns(UserWarning, match=r"with num_heads=4, got num_heads=2: they fit"):
            loaded = create_model("longnet_lm_base", pretrained=place, **options)
        assert loaded.config == replace(model.config, num_heads=2, dropout=0.5)
        assert torch.equal(loaded.embedding.weight, model.embedding.weight)
        with pytest.raises(ValueError, match=r"one of LongNetMLM, got model='LongNetLM'.*Load it"):
            create_model("longnet_mlm_tiny", pretrained=place)


def test_options_that_make_trained_weights_another_model_warn(tmp_path):
    create_model("longnet_lm_tiny", **SMALL).save_pretrained(tmp_path)
    changed = {"position": "rotary", "scale_embedding": True, "dropout": 0.5}
    words = r"with position='xpos', scale_embedding=False, got position='rotary', .*=True: they fit"
    with pytest.warns(UserWarning, match=words):
        create_model("longnet_lm_tiny", pretrained=True, **changed)
    recipe = {"model_name": "longnet_lm_tiny", "model_options": {"vocab_size": 300, **SMALL}}
    weights = create_model("longnet_lm_tiny", **recipe["model_options"]).state_dict()
    checkpoint = {"state_dict": weights, "hyper_parameters": recipe}
    with pytest.warns(UserWarning, match="the state dict were trained with position='xpos'"):
        create_model("longnet_lm_tiny", pretrained=checkpoint, position=None)
    with pytest.warns(UserWarning, match=r"with rotary_base=10000.0, got rotary_base=500.0"):
        LongNetLM.from_pretrained(tmp_path, rotary_base=500.0)


def test_another_attention_pattern_of_trained_weights_is_silent():
    pattern = {"segment_lengths": (1024, 65536), "dilation_rates": (1, 32)}
    assert create_model("longnet_lm_tiny", pretrained=True, **pattern)  # warnings are errors


def test_folder_of_another_size_than_the_name_is_refused(tmp_path):
    create_model("longnet_lm_tiny", **SMALL).save_pretrained(tmp_path)
    message = (
        r"'longnet_lm_base' must have embed_dim=768, num_heads=12, .*has embed_dim=24, num_heads=4"
        r"\. Pass these as options, or call LongNetLM\.from_pretrained"
    )
    with pytest.raises(ValueError, match=message):
        create_model("longnet_lm_base", pretrained=tmp_path, num_layers=1)
    # The cure that the message names.
    sizes = {"embed_dim": 24, "num_layers": 1, "num_heads": 4}
    assert create_model("longnet_lm_base", pretrained=tmp_path, **sizes).config.vocab_size == 61


def recipe_checkpoint(state_dict, name, options):
    """What Lightning saves for our recipes."""
    return {
        "state_dict": {f"model.{key}": x for key, x in state_dict.items()},
        "hyper_parameters": {"model_name": name, "num_classes": 2, "model_options": options},
    }


def test_checkpoint_of_a_recipe_brings_its_options(tmp_path, caplog):
    model = create_model("longnet_lm_tiny", **SMALL, **TRAINED)
    content = recipe_checkpoint(model.state_dict(), "longnet_lm_tiny", {**SMALL, **TRAINED})
    torch.save(content, tmp_path / "x.ckpt")
    for pretrained in (content, tmp_path / "x.ckpt"):
        loaded = create_model("longnet_lm_tiny", pretrained=pretrained, dropout=0.5)
        assert loaded.config == replace(model.config, dropout=0.5)
        assert torch.equal(loaded.eval()(TOKENS), model.eval()(TOKENS))
        message = "of the model 'longnet_lm_base', got one of 'longnet_lm_tiny'. Create that model"
        with pytest.raises(ValueError, match=message):
            create_model("longnet_lm_base", pretrained=pretrained)
    # Options that were left at their defaults are known, too.
    plain = create_model("longnet_lm_tiny", num_layers=1)
    content = recipe_checkpoint(plain.state_dict(), "longnet_lm_tiny", {"num_layers": 1})
    assert create_model("longnet_lm_tiny", pretrained=content).config == plain.config
    content["hyper_parameters"]["model_options"] = None
    plain = create_model("longnet_lm_tiny")
    content["state_dict"] = plain.state_dict()
    assert create_model("longnet_lm_tiny", pretrained=content).config == plain.config
    assert caplog.messages == []


def test_checkpoint_of_the_recipe_for_slides_gives_its_encoder():
    name, options = SMALL_MODELS["gigapath_slide"]
    options = {**options, **TRAINED}
    model = create_model(name, **options)
    network = nn.ModuleDict({"encoder": model, "head": nn.Linear(32, 2)})
    content = recipe_checkpoint(network.state_dict(), name, options)
    loaded = create_model(name, pretrained=content)
    assert loaded.config == model.config
    assert torch.equal(loaded.tile_embed.weight, model.tile_embed.weight)


@pytest.mark.parametrize("family", sorted(CONVERTERS))
def test_plain_weights_that_do_not_say_their_rules_are_told_of(family, caplog):
    name, options = SMALL_MODELS[family]
    model = create_model(name, **options, **CONVERTERS[family].options)
    create_model(name, pretrained=model.state_dict(), **options)
    if family == "longnet_beit3":  # has no such options
        assert caplog.messages == []
        return
    (message,) = caplog.messages
    assert "the state dict does not say by which rules" in message
    assert "the model has head_offset='modulo', padded_keys='ignore'. Pass" in message
    assert "head_offset='block', padded_keys='zero'). Folders of save_pretrained" in message
    caplog.clear()
    create_model(name, pretrained=model.state_dict(), **options, padded_keys="zero")
    create_model(name, pretrained=to_published_state_dict(model), **options)
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (nn.Linear(2, 2), TypeError, "one of this package, got Linear"),
        ("other", NotImplementedError, "like those of OtherLM are published.*longnet_lm, "),
    ],
)
def test_model_without_published_names_is_refused(model, error, message):
    if model == "other":
        model = OtherLM(OtherConfig(**SMALL))
    with pytest.raises(error, match=message):
        to_published_state_dict(model)


def test_weights_are_looked_for_before_the_model_is_made(monkeypatch):
    def build(config):
        raise AssertionError("the model was made")

    entry = replace(find_model("longnet_lm_2b7"), build=build)
    monkeypatch.setitem(registry._ENTRIES, "longnet_lm_2b7", entry)
    with pytest.raises(FileNotFoundError, match=r"gone\.pth"):
        create_model("longnet_lm_2b7", pretrained="gone.pth")


def test_list_models_filters():
    assert list_models("*mlm*") == list_models(family="longnet_mlm")
    assert list_models("*mlm*") == ["longnet_mlm_base", "longnet_mlm_tiny"]
    assert set(list_models(modality="text")) < set(list_models())
    assert "longvit_small_patch32_1024" in list_models(pretrained=True)
    assert "longnet_lm_base" in list_models(pretrained=False)
    with pytest.raises(ValueError, match=r"modality must be one of .*'text'.*, got 'smell'"):
        list_models(modality="smell")


def test_model_info_takes_no_memory_and_defaults_to_the_longest_segment():
    info = model_info("longnet_lm_2b7")
    assert info.num_params > 2.7e9
    assert info.seq_len == 32768
    assert info.config == find_model("longnet_lm_2b7").config
    assert info.weights == ()
    assert "2307.02486" in info.source
    assert model_info("longnet_lm_2b7", 65536).flops == 2 * info.flops


def test_model_info_tells_what_published_names_bring():
    assert model_info("longvit_tiny_patch8_64").published_options == TRAINED
    assert model_info("longnet_beit3_tiny").published_options == {}


@pytest.mark.parametrize("seq_len", [0, -1, 2.0, True])
def test_model_info_refuses_lengths_below_one(seq_len):
    with pytest.raises(ValueError, match=f"seq_len must be an integer .*got {seq_len}"):
        model_info("longnet_lm_tiny", seq_len)


def test_factory_registers_every_model_by_itself():
    assert len(factory.list_models()) >= 7
