"""Small slide encoders and slides for tests."""

import torch

from longnet_zoo.models import GigaPathSlideConfig, GigaPathSlideEncoder

INPUT_DIM, EMBED_DIM, NUM_TILES, GRID_SIZE = 10, 24, 43, 20
# Awkward on purpose: no segment divides the length, rates do not divide segments or heads.
SMALL = {
    "embed_dim": EMBED_DIM,
    "num_layers": 2,
    "num_heads": 4,
    "ffn_dim": 40,
    "segment_lengths": (7, 16, 30),
    "dilation_rates": (1, 2, 3),
    "input_dim": INPUT_DIM,
    "grid_size": GRID_SIZE,
    "dropout": 0.0,
    "drop_path": 0.0,
}
PUBLISHED = {"head_offset": "block", "padded_keys": "zero"}


def make_encoder(**options):
    return GigaPathSlideEncoder(GigaPathSlideConfig(**{**SMALL, **options}))


def draw_slides(batch=2, num_tiles=NUM_TILES):
    """Tiles, and coordinates that put each in a cell of its own."""
    cells = torch.stack([torch.randperm(GRID_SIZE**2)[:num_tiles] for _ in range(batch)])
    coords = 256 * torch.stack([cells // GRID_SIZE, cells % GRID_SIZE], dim=-1)
    return torch.randn(batch, num_tiles, INPUT_DIM), coords
