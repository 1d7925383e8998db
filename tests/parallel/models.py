"""What the cases over models share: a mesh of all ranks, and a small text model."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from longnet_zoo.factory import create_model
from tests.models.families import PATTERN, TEXT


def mesh_of(size: int | None = None):
    return init_device_mesh("cpu", (size or dist.get_world_size(),))


def text_model(name="longnet_lm_tiny", **options):
    return create_model(name, **{**TEXT, **PATTERN, "ffn_dim": 40, "num_layers": 2, **options})
