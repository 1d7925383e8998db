"""Shards to test on: sample number i of shard s is `s-i`, and says so in its text."""

import itertools
from pathlib import Path

from recipes.shard_writer import ShardWriter

SIZES = (5, 3, 7, 4)


def write_shards(folder: Path, sizes=SIZES) -> list[Path]:
    """Writes a shard of each size; each member has a block of data."""
    paths = []
    for shard, size in enumerate(sizes):
        with ShardWriter(folder, prefix=f"part{shard}") as writer:
            for row in range(size):
                text = f"{shard}-{row}"
                writer.write(f"in/{text}", {"txt": text.encode(), "bin": bytes(600)})
        paths.append(folder / f"part{shard}-000000.tar")
    return paths


def names(sizes=SIZES) -> list[str]:
    return [f"{shard}-{row}" for shard, size in enumerate(sizes) for row in range(size)]


def decode(sample):
    return {"name": sample["txt"].decode(), "size": len(sample["bin"])}


def collate(samples):
    return {"names": [sample["name"] for sample in samples]}


def take(loader, number):
    """Returns batches across epochs."""
    found = []
    while len(found) < number:
        found += itertools.islice(iter(loader), number - len(found))
    return [(*batch["names"], int(batch["num_skipped"])) for batch in found]


def sample_names(batches):
    return [name for batch in batches for name in batch[:-1]]


def cut(folder):
    path = folder / "part2-000000.tar"
    # In the second member of its sample 3.
    path.write_bytes(path.read_bytes()[: 512 * 17 + 3])
    return {
        "2-3",
        "2-4",
        "2-5",
        "2-6",
    }, r"part2-000000.tar, from its sample number 3 on: sample in/2-3"


def gone(folder):
    (folder / "part1-000000.tar").unlink()
    return {"1-0", "1-1", "1-2"}, r"part1-000000.tar, from its sample number 0 on: No such file"


def bad(sample):
    if sample["__key__"] == "in/2-1":
        raise OSError("broken picture")
    return decode(sample)


def without_extension(sample):
    return {**decode(sample), "label": sample["cls" if sample["__key__"] == "in/3-3" else "txt"]}


def nothing(folder):
    return {"2-1"}, r"part2-000000.tar, sample in/2-1: broken picture"


def lacking(folder):
    return {"3-3"}, r"part3-000000.tar, sample in/3-3: it has no 'cls', only txt, bin"


DAMAGES = {
    "cut": (cut, decode),
    "gone": (gone, decode),
    "bad": (nothing, bad),
    "extension": (lacking, without_extension),
}


def damaged_shards(folder, kind):
    """Writes damaged shards; returns them, how to decode them, what is lost and what is said."""
    paths = [str(path) for path in write_shards(folder)]
    damage, decode_it = DAMAGES[kind]
    return paths, decode_it, *damage(folder)
