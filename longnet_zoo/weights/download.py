"""Files from plain addresses, kept on disk, and their SHA-256."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import torch
from huggingface_hub import constants
from huggingface_hub.utils import tqdm

__all__ = ["DownloadOptions", "check_digest", "download_url"]

_LOGGER = logging.getLogger(__name__)
_TIMEOUT_S = 30.0  # without a byte from the server
_CHUNK_BYTES = 1 << 20
_NAME_DIGITS = 8


@dataclass(frozen=True, kw_only=True)
class DownloadOptions:
    """How weights are fetched.

    Attributes:
        revision: Branch, tag or commit of a repository of the Hub; None: its main branch.
        cache_dir: Folder for what is downloaded; None: the cache of huggingface_hub or torch.hub.
        token: Token for the Hub; None or True: the one of the login, False: none.
        local_files_only: Whether to take only what was downloaded before; `HF_HUB_OFFLINE=1` in
            the environment does the same.
    """

    revision: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    token: str | bool | None = None
    local_files_only: bool = False

    @property
    def cache_folder(self) -> Path | None:
        """`cache_dir` as a path, `~` resolved."""
        return None if self.cache_dir is None else Path(self.cache_dir).expanduser()

    @property
    def is_offline(self) -> bool:
        """Whether the network must not be used."""
        return self.local_files_only or bool(constants.HF_HUB_OFFLINE)


def download_url(url: str, options: DownloadOptions) -> Path:
    """Downloads a file, unless it was downloaded before.

    Args:
        url: Its address.
        options: Where to keep it, and whether the network may be used.

    Returns:
        Its path. The name has a digest of the address in it: files of one name do not meet.

    Raises:
        FileNotFoundError: If it was not downloaded before and the network must not be used.
        ConnectionError: If it cannot be downloaded; nothing of it is kept then.
    """
    folder = options.cache_folder or Path(torch.hub.get_dir(), "checkpoints")
    name = Path(urlsplit(url).path)
    path = folder / f"{name.stem}-{_digest_of(url)}{name.suffix}"
    if path.exists():
        return path
    if options.is_offline:
        raise FileNotFoundError(
            f"{url} is not in {folder} and the network is turned off, got local_files_only="
            f"{options.local_files_only} and HF_HUB_OFFLINE={constants.HF_HUB_OFFLINE}. Download "
            "the file by hand and pass its path."
        )
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        _fetch(url, partial)
        os.replace(partial, path)  # whoever sees the file sees all of it
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(
            f"cannot download {url} to {folder}: {type(error).__name__}: {error}. Download the "
            "file by hand and pass its path."
        ) from error
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()
    return path


def check_digest(path: Path, expected: str | None, *, source: str) -> None:
    """Compares the SHA-256 of a file with what it must be, or logs it where nobody knows.

    Args:
        path: The file.
        expected: The digest in hex, or None.
        source: Where the file is from, for the message.

    Raises:
        ValueError: If the digest is another one.
    """
    if expected is None and not _LOGGER.isEnabledFor(logging.INFO):
        return
    digest = _sha256(path)
    if expected is None:
        _LOGGER.info("%s has SHA-256 %s; its publisher states none to compare with", source, digest)
    elif digest != expected.lower():
        raise ValueError(
            f"{source} must have SHA-256 {expected.lower()}, got {digest} in {path}. The file is "
            "damaged or not the registered one; delete it to download it again."
        )


def _fetch(url: str, path: Path) -> None:
    request = Request(url, headers={"User-Agent": "longnet-zoo"})
    with urlopen(request, timeout=_TIMEOUT_S) as response, path.open("xb") as file:
        length = response.headers.get("Content-Length")
        total = None if length is None else int(length)
        with tqdm(total=total, unit="B", unit_scale=True, desc=path.stem) as progress:
            while chunk := response.read(_CHUNK_BYTES):
                file.write(chunk)
                progress.update(len(chunk))
        # A connection that breaks off looks like the end of the file to http.client.
        if total is not None and file.tell() != total:
            raise ConnectionError(f"got {file.tell()} of {total} bytes")


def _digest_of(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()[:_NAME_DIGITS]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
