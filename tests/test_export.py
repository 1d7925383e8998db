"""`longnet-zoo export`."""

import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from longnet_zoo.cli import main
from longnet_zoo.factory import create_model

OPTIONS = {"embed_dim": 24, "num_layers": 1, "num_heads": 4}
FLAGS = [f"--option={name}={value}" for name, value in OPTIONS.items()]


@pytest.fixture
def model(tmp_path):
    model = create_model("longnet_lm_tiny", **OPTIONS)
    save_file(dict(model.state_dict()), tmp_path / "w.safetensors")
    return model


def test_folder_holds_weights_options_and_card(model, tmp_path, capsys):
    folder = tmp_path / "out"
    source = str(tmp_path / "w.safetensors")
    main(["export", "longnet_lm_tiny", "--pretrained", source, "--output", str(folder), *FLAGS])
    out = capsys.readouterr().out
    assert f"LongNetLM, {model.num_params():,} parameters, float32" in out
    assert json.loads((folder / "config.json").read_text())["embed_dim"] == 24
    card = (folder / "README.md").read_text()
    assert f"LongNetLM with {model.num_params():,} parameters, float32, exported from" in card
    call = (
        "create_model('longnet_lm_tiny', pretrained='{}', embed_dim=24, num_layers=1, num_heads=4)"
    )
    assert f"    model = lz.{call.format('FOLDER')}\n" in card
    assert f"use: --pretrained {folder} --option embed_dim=24" in out
    assert f"or {call.format(folder)}\n" in out
    loaded = create_model("longnet_lm_tiny", pretrained=folder, **OPTIONS)
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)
    weights, config = (folder / name for name in ("model.safetensors", "config.json"))
    assert weights.stat().st_mode == config.stat().st_mode


def test_weights_are_rounded_on_request(model, tmp_path):
    folder, source = tmp_path / "out", str(tmp_path / "w.safetensors")
    flags = ["--pretrained", source, "--output", str(folder), "--dtype=bfloat16"]
    main(["export", "longnet_lm_tiny", *flags, *FLAGS])
    for name, weight in load_file(folder / "model.safetensors").items():
        assert torch.equal(weight, model.state_dict()[name].bfloat16())


@pytest.mark.parametrize("word", ["True", "false"])
def test_a_switch_is_no_source(word, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["export", "longnet_lm_tiny", "--pretrained", word, "--output", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert f"--pretrained: takes a place of weights and is no switch, got '{word}'. Give" in error
    assert error.count("\n") == 1


def test_nothing_is_overwritten(model, tmp_path, capsys):
    flags = ["--pretrained", str(tmp_path / "w.safetensors"), "--output", str(tmp_path)]
    with pytest.raises(SystemExit):
        main(["export", "longnet_lm_tiny", *flags, *FLAGS])
    assert "--output must be a new folder, got" in capsys.readouterr().err


def test_a_place_for_no_folder_is_refused_before_anything_is_read(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    flags = ["--pretrained", "nowhere", "--output", str(tmp_path / "file" / "out")]
    with pytest.raises(SystemExit):
        main(["export", "longnet_lm_tiny", *flags])
    error = capsys.readouterr().err
    assert "--output must be a new folder, got" in error
    assert "which cannot be made: " in error


def test_what_could_not_be_written_leaves_nothing(model, tmp_path, monkeypatch, capsys):
    def fill_up(*arguments, **options):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("longnet_zoo.export._card", fill_up)
    folder = tmp_path / "all" / "out"
    flags = ["--pretrained", str(tmp_path / "w.safetensors"), "--output", str(folder)]
    with pytest.raises(SystemExit):
        main(["export", "longnet_lm_tiny", *flags, *FLAGS])
    assert capsys.readouterr().err == "longnet-zoo: error: No space left on device\n"
    assert list(folder.parent.iterdir()) == []


def test_arguments_of_the_command_are_no_options(tmp_path, capsys):
    flags = ["--pretrained", "nowhere", "--output", str(tmp_path / "out"), "--option=cache_dir=x"]
    with pytest.raises(SystemExit):
        main(["export", "longnet_lm_tiny", *flags])
    assert "--option takes no cache_dir, got 'cache_dir=x'" in capsys.readouterr().err
