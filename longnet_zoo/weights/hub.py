"""Files of repositories on the Hugging Face Hub, through huggingface_hub and its cache."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import _CACHED_NO_EXIST, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .download import DownloadOptions

__all__ = ["HUB_PREFIX", "HubLocation", "cached_sha256", "download_hub", "parse_hub_location"]

HUB_PREFIX = "hf_hub:"
_LOCATION = re.compile(r"(?P<repo>[^/@\s]+/[^/@\s]+)(@(?P<revision>[^/\s]+))?(/(?P<filename>\S+))?")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class HubLocation:
    """A repository on the Hub, or one file in it.

    Attributes:
        repo_id: `"owner/name"`.
        revision: Branch, tag or commit; None: the main branch.
        filename: Path of the file in the repository; None: the repository.
    """

    repo_id: str
    revision: str | None
    filename: str | None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{HUB_PREFIX}{self.repo_id}{revision}"


def parse_hub_location(location: str, revision: str | None = None) -> HubLocation:
    """Takes `"hf_hub:owner/name[@revision][/file]"` apart.

    Args:
        location: The text.
        revision: A revision given beside it.

    Raises:
        ValueError: If the text has another form, or the two revisions differ.
    """
    match = _LOCATION.fullmatch(location.removeprefix(HUB_PREFIX))
    if match is None:
        raise ValueError(
            f"a place on the Hub must be '{HUB_PREFIX}owner/name[@revision][/file]', got "
            f"{location!r}. A revision with a slash goes into revision=..."
        )
    if revision and match["revision"] and revision != match["revision"]:
        raise ValueError(f"there are two revisions, got revision={revision!r} and {location!r}.")
    return HubLocation(
        repo_id=match["repo"],
        revision=revision or match["revision"],
        filename=match["filename"],
    )


def download_hub(location: HubLocation, filename: str, options: DownloadOptions) -> Path | None:
    """Finds a file of a repository in the cache, or downloads it into the cache.

    Args:
        location: The repository; its revision counts, not that of the options.
        filename: Path of the file in the repository.
        options: Cache, token, and whether the network may be used.

    Returns:
        Its path in the cache; None if the repository has no such file.

    Raises:
        PermissionError: If the repository is gated.
        FileNotFoundError: If there is no such repository or revision, or the file is not in the
            cache and the network is turned off or down.
        ConnectionError: If the network or the Hub fails in another way.
    """
    try:
        path = hf_hub_download(
            location.repo_id,
            filename,
            revision=location.revision,
            cache_dir=options.cache_folder,
            token=options.token,
            local_files_only=options.local_files_only,
        )
    except EntryNotFoundError as error:
        is_answer = not isinstance(error, LocalEntryNotFoundError)
        if is_answer or _is_known_to_be_absent(location, filename, options):
            return None
        raise _explain(error, location, filename, options) from error
    except (ValueError, TypeError):  # a wrong argument
        raise
    except Exception as error:  # network errors differ from version to version of huggingface_hub
        raise _explain(error, location, filename, options) from error
    return Path(path)


def cached_sha256(path: Path) -> str | None:
    """Reads the SHA-256 that the Hub stated for a file in its cache; None if it stated none.

    Large files have it as the name of their blob, which the path is a link to.
    """
    # One link only: a blob may itself be a link into a store with other names.
    name = path.readlink().name if path.is_symlink() else ""
    return name if _SHA256.fullmatch(name) else None


def _is_known_to_be_absent(location: HubLocation, filename: str, options: DownloadOptions) -> bool:
    """Whether the Hub has said before that the repository has no such file."""
    found = try_to_load_from_cache(
        location.repo_id, filename, cache_dir=options.cache_folder, revision=location.revision
    )
    return found is _CACHED_NO_EXIST


def _explain(
    error: Exception, location: HubLocation, filename: str, options: DownloadOptions
) -> OSError:
    """Says what an error of huggingface_hub means here, and what to do about it."""
    by_hand = f"or download {filename} by hand and pass its path."
    page = f"{constants.ENDPOINT}/{location.repo_id}"
    if isinstance(error, GatedRepoError):  # before RepositoryNotFoundError, of which it is one
        return PermissionError(
            f"{location} is gated. Ask for access on {page}, then run `hf auth login` or pass "
            f"token=..., {by_hand}"
        )
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(
            f"{location}: the repository has no revision {location.revision!r}; {page} lists its "
            "branches and tags."
        )
    if isinstance(error, RepositoryNotFoundError):
        return FileNotFoundError(
            f"{location}: the Hub has no such repository, or it is private. Check the name on "
            f"{page}, run `hf auth login` or pass token=..., {by_hand}"
        )
    if isinstance(error, LocalEntryNotFoundError):
        network = "is turned off" if options.is_offline else "does not reach the Hub"
        return FileNotFoundError(
            f"{location}: {filename} is not in the cache and the network {network}, got "
            f"local_files_only={options.local_files_only} and HF_HUB_OFFLINE="
            f"{constants.HF_HUB_OFFLINE}. Download it once with the network on, {by_hand}"
        )
    reason = (str(error).splitlines() or [""])[0]
    return ConnectionError(
        f"cannot download {filename} of {location}: {type(error).__name__}: {reason} Try again, "
        f"{by_hand}"
    )
