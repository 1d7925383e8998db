"""A stream takes the same memory however long it gets, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# Chunks that cut every segment, so that the cache is in use at each.
READ = """
import json
import torch
from longnet_zoo.factory import create_model

def resident_kib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))

torch.set_num_threads(1)
pattern = {"segment_lengths": (512, 2048, 8192), "dilation_rates": (1, 2, 4)}
model = create_model("longnet_lm_tiny", embed_dim=32, num_heads=2, num_layers=1, **pattern).eval()
cache = model.make_cache()
tokens = torch.randint(256, (1, 4100))
resident, kept = [], []
with torch.no_grad():
    for _ in range(49):
        model.forward_features(tokens, cache=cache)
        resident.append(resident_kib())
        kept.append(cache.num_bytes)
print(json.dumps([cache.lengths, resident, kept]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_is_flat_after_the_longest_segment():
    done = subprocess.run(
        [sys.executable, "-c", READ],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lengths, resident, kept = json.loads(done.stdout)
    assert lengths == [49 * 4100]
    # The longest segment, 8,192 tokens, ends within the second chunk.
    first = resident[1]
    assert max(resident[1:]) < 1.05 * first
    # What is kept is far less than that, and not a byte more than after that segment.
    assert kept[1] > 0
    assert set(kept[1:]) == {kept[1]}
