import argparse

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from longnet_zoo.factory import create_model
from longnet_zoo.weights import load_state_dict, read_state_dict


def state():
    return {"weight": torch.randn(2, 3), "bias": torch.randn(2)}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin", ".ckpt"])
def test_file_gives_back_what_was_saved(suffix, tmp_path):
    saved, path = state(), tmp_path / f"w{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(saved, path)
    read = read_state_dict(path)
    assert read.keys() == saved.keys()
    assert all(torch.equal(read[key], saved[key]) for key in saved)


def test_checkpoint_may_carry_its_arguments(tmp_path):
    saved = state()
    torch.save({"model": saved, "args": argparse.Namespace(lr=0.1)}, tmp_path / "w.pth")
    assert read_state_dict(tmp_path / "w.pth").keys() == saved.keys()
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize(
    "content",
    [
        lambda x, y: {"state_dict": x, "epoch": 3},
        lambda x, y: {"model": x, "optimizer": {"state": y}},
        lambda x, y: {"student": y, "teacher": x, "epoch": 3},
        lambda x, y: {"module": x},
        lambda x, y: {"state_dict": {}, "model": x},
        lambda x, y: {"model": {"state_dict": x}},
        lambda x, y: {f"module.{key}": value for key, value in x.items()},
        lambda x, y: {"teacher": {f"module.{key}": value for key, value in x.items()}},
        lambda x, y: {"state_dict": {f"model._orig_mod.{key}": v for key, v in x.items()}},
    ],
)
def test_containers_and_prefixes_are_removed(content, tmp_path):
    saved = state()
    other = {key: x + 1 for key, x in saved.items()}
    torch.save(content(saved, other), tmp_path / "w.pth")
    read = read_state_dict(tmp_path / "w.pth")
    assert read.keys() == saved.keys()
    assert all(torch.equal(read[key], saved[key]) for key in saved)


def test_training_checkpoint_gives_the_weights_of_its_model(tmp_path):
    saved = state()
    weights = {f"model.{key}": x for key, x in saved.items()}
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "last.ckpt")
    assert read_state_dict(tmp_path / "last.ckpt").keys() == saved.keys()
    # A prefix that not all names have belongs to the names.
    torch.save({"state_dict": {**weights, "scale": saved["bias"]}}, tmp_path / "other.ckpt")
    assert "model.weight" in read_state_dict(tmp_path / "other.ckpt")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("cut", [0, 10, 300])
def test_damaged_file_is_one_clear_error(suffix, cut, tmp_path):
    path = tmp_path / f"w{suffix}"
    saved = {"weight": torch.randn(50, 50)}
    (save_file if suffix == ".safetensors" else torch.save)(saved, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=f"cannot read weights from .*w{suffix}.*damaged"):
        read_state_dict(path)


class Unwelcome:
    """Python objects in a file are code that would run."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": Unwelcome()}, "cannot read weights .*plain state dict"),
        ([torch.zeros(2)], "must be a mapping of names to tensors, .* holds a list"),
        ({"student": {"weight": torch.zeros(2)}, "epoch": 3}, r"entries \['student', 'epoch'\]"),
        ({"model": {}}, "it is empty"),
        ({}, "it is empty"),
        ({5: torch.zeros(2)}, r"the entries \[5\] are not"),
        ({"w": torch.zeros(2, device="meta")}, r"tensors with data, .* the entries \['w'\] are"),
    ],
)
def test_file_without_plain_weights_is_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message):
        read_state_dict(tmp_path / "w.pth")


def test_path_that_is_no_weight_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.pth', which does not exist"):
        read_state_dict(tmp_path / "gone.pth")
    with pytest.raises(FileNotFoundError, match="which is a folder"):
        read_state_dict(tmp_path)
    (tmp_path / "w.npz").touch()
    with pytest.raises(ValueError, match=r"ending in .*got .*w\.npz"):
        read_state_dict(tmp_path / "w.npz")


def test_strict_loading_changes_nothing_unless_all_fits():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    before = {key: x.clone() for key, x in model.state_dict().items()}
    wrong = {"0.weight": torch.zeros(2, 4), "0.bias": torch.zeros(2), "2.bias": torch.zeros(2)}
    with pytest.raises(ValueError, match="my file does not fit Sequential") as caught:
        load_state_dict(model, wrong, source="my file")
    message = str(caught.value)
    assert "2 missing (1.bias, 1.weight)" in message
    assert "1 unexpected (2.bias)" in message
    assert "1 of another shape (0.weight: (2, 4) instead of (2, 3))" in message
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())


def test_strict_loading_copies_every_tensor():
    model, saved = nn.Linear(3, 2), state()
    load_state_dict(model, saved)
    assert torch.equal(model.weight, saved["weight"])
    assert model.weight.data_ptr() != saved["weight"].data_ptr()


def test_state_dict_of_something_else_is_refused():
    message = r"my dict must map names to tensors with data, .* at 5, bias, epoch, weight\."
    wrong = {5: torch.zeros(1), "weight": torch.zeros(2, 3, device="meta"), "bias": 1.0, "epoch": 3}
    with pytest.raises(ValueError, match=message):
        load_state_dict(nn.Linear(3, 2), wrong, source="my dict")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(value):
    model = nn.Linear(3, 2)
    before = model.bias.clone()
    wrong = state() | {"weight": torch.tensor([[0.0, 0.0, 0.0], [0.0, value, 0.0]])}
    message = r"my file must have finite numbers only, got .* in 1 tensors \(weight\)\. Take an"
    with pytest.raises(ValueError, match=message):
        load_state_dict(model, wrong, source="my file")
    assert torch.equal(model.bias, before)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.bool])
def test_tensors_that_would_be_cut_to_fit_are_refused(dtype):
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=rf"floating-point .*got weight: {dtype}\. Dequantize"):
        load_state_dict(model, state() | {"weight": torch.ones(2, 3).to(dtype)})
    load_state_dict(model, {key: x.half() for key, x in state().items()})


def test_image_of_another_size_names_the_way_to_it():
    name, options = "longvit_tiny_patch8_64", {"num_layers": 1}
    state_dict = create_model(name, **options).state_dict()
    model = create_model(name, img_size=96, **options)
    with pytest.raises(ValueError, match=r"img_size of the weights, then call set_input_size"):
        load_state_dict(model, state_dict)
    # The way that the message names.
    model = create_model(name, **options)
    load_state_dict(model, state_dict)
    model.set_input_size(96)
    with pytest.raises(ValueError, match="2 missing") as caught:
        load_state_dict(model, {k: x for k, x in state_dict.items() if "patch_embed" not in k})
    assert "1 of another shape (pos_embed: " in str(caught.value)


@pytest.mark.parametrize(
    ("name", "loaded", "wanted", "message"),
    [
        ("longvit_tiny_patch8_64", 5, 3, "1 of another|2 of another.*num_classes=5 as in the weig"),
        ("longvit_tiny_patch8_64", 5, 0, "unexpected .*head.bias.*num_classes=5 as in the weights"),
        ("longvit_tiny_patch8_64", 0, 5, "missing .*head.bias.*num_classes=0 as in the weights"),
        ("longnet_beit3_tiny", 5, 3, "num_classes=5 as in the weights, then call reset_classifier"),
    ],
)
def test_head_of_another_size_names_the_way_to_a_new_one(name, loaded, wanted, message):
    state_dict = create_model(name, num_layers=1, num_classes=loaded).state_dict()
    model = create_model(name, num_layers=1, num_classes=wanted)
    with pytest.raises(ValueError, match=message):
        load_state_dict(model, state_dict)
    # The way that the message names.
    model.reset_classifier(loaded)
    load_state_dict(model, state_dict)
    model.reset_classifier(wanted)


def test_other_keys_do_not_blame_the_head():
    model = create_model("longvit_tiny_patch8_64", num_layers=1, num_classes=5)
    state_dict = create_model("longvit_tiny_patch8_64", num_layers=2, num_classes=5).state_dict()
    with pytest.raises(ValueError, match="with the options that the weights") as caught:
        load_state_dict(model, state_dict)
    assert "num_classes" not in str(caught.value)
