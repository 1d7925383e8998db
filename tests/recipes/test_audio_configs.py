"""The configurations of the audio recipes parse, run at tiny size and say how they are run."""

import re
from pathlib import Path

import pytest
import yaml

from recipes import audio_classification, audio_tagging
from tests.recipes.audio_runs import CLASSES, tiny_audio
from tests.recipes.test_audio_shards import write_tone_shards

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "audio").rglob("*.yaml"))
MAINS = {
    "audio_classification": audio_classification.main,
    "audio_tagging": audio_tagging.main,
}


def main_of(config):
    return MAINS[re.search(r"python -m recipes\.(\w+) fit", config.read_text())[1]]


def test_there_are_the_configs_that_are_known():
    names = {config.name for config in CONFIGS}
    assert names == {"quickstart.yaml", "soundscapes.yaml", "longnet_audio_base_shards.yaml"}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_header_says_how_to_run_it_on_what_and_what_comes_out(config):
    header = config.read_text().split("\n\n", 1)[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert f"--config {config.relative_to(ROOT).as_posix()}" in header
    for heading in ("Hardware", "Expected time", "Expected result"):
        assert f"# {heading} " in header


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_parses_as_it_is(config, capsys):
    with pytest.raises(SystemExit) as stop:
        main_of(config)(["fit", f"--config={config}", "--print_config"])
    assert stop.value.code == 0
    written, parsed = yaml.safe_load(config.read_text()), yaml.safe_load(capsys.readouterr().out)
    for name, value in written["model"]["optimization"].items():
        assert parsed["model"]["optimization"][name] == value
    for name, value in written["data"].get("soundscapes", {}).items():
        assert parsed["data"]["soundscapes"][name] == value


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_runs_at_tiny_size(config, tmp_path):
    written = yaml.safe_load(config.read_text())
    options = {f"model.model_options.{name}": x for name, x in tiny_audio().items()}
    if written["data"]["source"] != "samples":
        options["data.source"] = options["data.val_source"] = write_tone_shards(tmp_path)
        options["data.class_names"] = list(CLASSES)
        options["model.num_classes"] = len(CLASSES)
        options["data.shards.shuffle"] = 4
    if "soundscapes" in written["data"]:
        options["data.soundscapes.seconds"] = 1.0
    options |= {
        "data.max_seconds": 0.5,
        "data.num_workers": 0,
        "data.batch_size": 4,
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.strategy": "auto",
        "trainer.precision": "32",
        "trainer.fast_dev_run": "true",
        "trainer.default_root_dir": tmp_path / "run",
    }
    changes = [f"--{name}={value}" for name, value in options.items()]
    main_of(config)(["fit", f"--config={config}", *changes])
    # fast_dev_run leaves nothing behind.
    assert not (tmp_path / "run").exists()
