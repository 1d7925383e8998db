"""Every Python block of the README runs as it stands, in order, as a reader would type it."""

import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import soundfile
import torch

from longnet_zoo.factory import create_model
from longnet_zoo.weights import to_published_state_dict
from tests.forked import fork_ranks
from tests.markdown import links, read_blocks, run_programme

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [block.text for block in read_blocks(README) if block.language == "python"]
# A programme of its own, which torchrun starts.
(PROGRAMME,) = (block for block in BLOCKS if "WORLD_SIZE" in block)


def test_there_is_a_short_first_example():
    assert BLOCKS
    lines = [line for line in BLOCKS[0].splitlines() if line.strip()]
    assert len(lines) <= 12


def write_slides(folder):
    """What the section for pathologists reads: tile embeddings, and released weights."""
    model = create_model("gigapath_slide_enc12l768d", head_offset="block", padded_keys="zero")
    torch.save({"model": to_published_state_dict(model)}, folder / "slide_encoder.pth")
    (folder / "tiles").mkdir()
    for number, num_tiles in enumerate((30, 20)):
        with h5py.File(folder / "tiles" / f"slide_{number}.h5", "w") as file:
            file["features"] = np.random.default_rng(0).standard_normal((num_tiles, 1536), "f4")
            file["coords"] = 256 * np.stack(np.divmod(np.arange(num_tiles), 7), axis=1)
    return model.eval()


@pytest.mark.slow
def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = write_slides(tmp_path)
    sound = 0.1 * np.random.default_rng(0).standard_normal((44_100, 2))
    soundfile.write("hour.flac", sound, samplerate=44_100)
    namespace: dict[str, object] = {"__name__": "readme"}
    for number, block in enumerate(BLOCKS, start=1):
        if block != PROGRAMME:
            exec(compile(block, f"README.md, block {number}", "exec"), namespace)
    assert namespace["embedding"].shape == (128,)  # type: ignore[attr-defined]
    slides = torch.load("slides.pt", weights_only=True)
    assert list(slides) == ["slide_0", "slide_1"]
    with h5py.File("tiles/slide_1.h5") as file, torch.inference_mode():
        tiles, coords = (torch.from_numpy(file[name][:])[None] for name in ("features", "coords"))
        torch.testing.assert_close(slides["slide_1"], model(tiles, coords)[0], atol=1e-5, rtol=0)


@pytest.mark.distributed
def test_the_programme_for_many_devices_prints_what_one_process_finds(tmp_path):
    ended = fork_ranks(tmp_path, run_programme, PROGRAMME, world_size=2)
    assert [process.status for process in ended] == [0, 0], ended
    lines = "".join(process.said for process in ended).splitlines()
    (line,) = (x for x in lines if re.fullmatch(r"[\d.]+ [\d.]+", x))
    torch.manual_seed(0)
    model = create_model("longnet_lm_tiny")
    tokens = torch.randint(0, 256, (1, 3001))
    loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    expected = loss.item(), model.embedding.weight.grad.norm().item()
    assert tuple(map(float, line.split())) == pytest.approx(expected, rel=1e-4)


def test_linked_files_exist():
    found = links(README)
    missing = [link for link in found if not (ROOT / link).exists()]
    assert found
    assert not missing


def test_commands_name_real_make_targets():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    named = set(re.findall(r"make ([a-z-]+)", README))
    assert {"train", "test"} <= named <= targets
