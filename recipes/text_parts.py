"""A process' part of a batch of text, where processes share sequences.

Shapes: b rows, n seq_len, c tokens of a part.
"""

from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from longnet_zoo.parallel import Layout, shard_padding_mask, shard_sequence

from .text_packing import IGNORE_INDEX

__all__ = ["shard_batch"]


def shard_batch(batch: dict[str, Any], mesh: DeviceMesh, *, layout: Layout) -> dict[str, Any]:
    """Takes this process' part of `tokens` and `labels`.

    Args:
        batch: `tokens` and `labels` (b, n), and possibly `cu_seqlens`, which stays whole; the same
            on all processes. A part stays as it is.
        mesh: The processes that share it.
        layout: Which tokens a process takes.

    Returns:
        `tokens` and `labels` (b, c), `is_part`, and `key_padding_mask` (b, c) where the parts of
        all processes together are longer than the sequence and no `cu_seqlens` says so.
    """
    if batch.get("is_part"):
        return batch
    batch_size, seq_len = batch["tokens"].shape
    part = dict(batch) | {
        name: shard_sequence(batch[name], mesh, layout=layout, pad_value=value)
        for name, value in (("tokens", 0), ("labels", IGNORE_INDEX))
    }
    if "cu_seqlens" not in batch:
        mask = shard_padding_mask(None, seq_len, batch_size, mesh, layout=layout)
        part |= {} if mask is None else {"key_padding_mask": mask}
    return part | {"is_part": True}
