"""The registered slide encoders at their full sizes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longnet_zoo.factory import create_model, list_models, model_info
from longnet_zoo.registry import find_model

# Parameter counts of the published code, and its segment lengths for slides of 262,144 pixels.
NUM_PARAMS = {
    "gigapath_slide_enc12l768d": 86_330_880,
    "gigapath_slide_enc24l1024d": 304_134_144,
    "gigapath_slide_enc12l1536d": 342_531_072,
}


@pytest.mark.parametrize("name", NUM_PARAMS)
def test_registered_sizes_are_the_published_ones(name):
    info = model_info(name)
    assert info.num_params == NUM_PARAMS[name]
    assert info.pattern.segment_lengths == (1024, 5792, 32768, 185363, 1048576)
    assert info.pattern.dilation_rates == (1, 2, 4, 8, 16)
    config = info.config
    assert (config.num_heads, config.input_dim, config.tile_size) == (16, 1536, 256)
    assert (config.dropout, config.drop_path, config.attention_dropout) == (0.25, 0.1, 0.0)
    assert (config.eps, config.norm_eps, config.norm) == (1e-5, 1e-6, "sub_ln")
    with torch.device("meta"):
        model = create_model(name)
    assert len(model.state_dict()) == 7 + 20 * config.num_layers
    assert not list(model.buffers())  # no table of positions


def test_catalogue_lists_the_slide_encoders():
    assert list_models("*slide*") == sorted(NUM_PARAMS) == list_models(modality="slide")
    (weights,) = find_model("gigapath_slide_enc12l768d").weights
    assert weights.location == "hf_hub:prov-gigapath/prov-gigapath/slide_encoder.pth"
    assert list_models(family="gigapath_slide", pretrained=True) == ["gigapath_slide_enc12l768d"]


MEASURE_MEMORY = """
import torch
import longnet_zoo
from longnet_zoo.factory import create_model

def read_mib(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name)) / 1024

imported = read_mib("VmRSS")
model = create_model("gigapath_slide_enc12l768d", head_offset="block", padded_keys="zero").eval()
coords = 256 * torch.cartesian_prod(torch.arange(64), torch.arange(64))[None]
with torch.inference_mode():
    assert model(torch.randn(1, 4096, 1536), coords).isfinite().all()
print(read_mib("VmHWM") - imported)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_released_size_takes_little_memory():
    done = subprocess.run(
        [sys.executable, "-c", MEASURE_MEMORY],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Weights and tiles are 354 MiB; a table of the grid alone would be 2,930.
    assert 354 < float(done.stdout) < 1200
