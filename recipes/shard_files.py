"""Samples in tar shards as webdataset lays them out, and what every source of samples offers.

A shard is a `.tar` or `.tar.gz`, here or behind a URL. Members that follow each other and have the
same key, the path up to the first dot of the file's name, are one sample; what comes behind that
dot says what a member is: `0001.jpg` and `0001.txt` are the sample `0001` with `jpg` and `txt`.

The package webdataset is not used: what matters here is to go on at any sample of any shard, and
to say by name what is damaged, and it offers neither. The shards are the same.
"""

import contextlib
import glob
import gzip
import io
import itertools
import re
import tarfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Protocol, cast

__all__ = ["Problem", "RowSource", "Sample", "TarSource", "find_shards", "split_name"]

_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_GZIP = b"\x1f\x8b"


class Sample(dict[str, Any]):
    """The parts of a sample by extension or column, `__key__` and `__url__` among them.

    A part that is missing raises ValueError, so that the sample counts as damaged.
    """

    def __missing__(self, name: str) -> Any:
        found = ", ".join(key for key in self if not key.startswith("__")) or "nothing"
        raise ValueError(f"it has no {name!r}, only {found}")

    def first(self, *names: str) -> Any:
        """Returns the first part that is there: `sample.first("jpg", "png")`.

        Raises:
            ValueError: None of them is there.
        """
        return self[next((name for name in names if name in self), " or ".join(names))]

    def file(self, *names: str) -> bytes:
        """Returns the first part that is there, the content of a file.

        Raises:
            ValueError: None of them is there, or it is no such content, but a path, for instance.
        """
        found = self.first(*names)
        if not isinstance(found, bytes):
            raise ValueError(
                f"it needs the bytes of a file under {' or '.join(names)!r}, got {found!r}"[:200]
            )
        return found


class Problem(NamedTuple):
    """A sample that cannot be read, although those behind it can."""

    key: str
    reason: str


class RowSource(Protocol):
    """Where samples come from: shards of rows, each readable from any row on.

    Attributes:
        shards: Name of each shard.
    """

    shards: Sequence[str]

    def rows(self, shard: int, *, start: int = 0) -> Iterator[Sample | Problem]:
        """Reads a shard from a row on.

        Raises:
            OSError: The shard cannot be read, or no further.
        """
        ...

    def num_rows(self, shard: int) -> int:
        """Counts the rows of a shard.

        Where it cannot be read any further, that place counts as one; so does an empty shard.
        """
        ...


class TarSource:
    """Tar shards.

    Args:
        urls: What `find_shards` takes.
        attempts: How often a remote shard is tried before it counts as unreadable.
        pause_s: Seconds before the second attempt; before each further one four times as long.

    Raises:
        ValueError: As `find_shards`.
    """

    def __init__(
        self, urls: str | Sequence[str], *, attempts: int = 3, pause_s: float = 1.0
    ) -> None:
        if attempts < 1 or pause_s < 0:
            raise ValueError(
                "attempts must be 1 or more and pause_s 0 or more, got "
                f"attempts={attempts} and pause_s={pause_s}."
            )
        self.shards: Sequence[str] = find_shards(urls)
        self._attempts, self._pause_s = attempts, pause_s
        self._counts: dict[int, int] = {}

    def rows(self, shard: int, *, start: int = 0) -> Iterator[Sample | Problem]:
        """Reads a shard from a row on; see `RowSource`."""
        url, failures = self.shards[shard], 0
        while True:
            try:
                for sample in _samples(url, start=start):
                    yield sample
                    start, failures = start + 1, 0
                return
            except OSError as error:
                failures += 1
                # What is not there is not there the next time either.
                is_final = not _is_remote(url) or isinstance(error, FileNotFoundError)
                if is_final or failures >= self._attempts:
                    raise
            time.sleep(self._pause_s * 4 ** (failures - 1))

    def num_rows(self, shard: int) -> int:
        """Counts the samples of a shard once, by the headers of its members; see `RowSource`."""
        if shard not in self._counts:
            number = 0
            # The row at which a shard breaks off has begun by then.
            with contextlib.suppress(OSError):
                for _ in _keys(self.shards[shard]):
                    number += 1
            self._counts[shard] = max(number, 1)
        return self._counts[shard]


def find_shards(urls: str | Sequence[str]) -> list[str]:
    """Lists shards.

    Args:
        urls: A path, or a URL that fsspec knows (https, s3, gs, hf); also with ranges in braces,
            `data/train-{000000..000999}.tar`, lists in braces, `{a,b}.tar`, or wildcards; a
            folder, for the shards in it; or a list of these.

    Returns:
        Their names, in the order given, those of a wildcard or a folder sorted.

    Raises:
        ValueError: There are none, or all are files that do not exist, or a brace is wrong.
    """
    patterns = [urls] if isinstance(urls, str) else list(urls)
    names = [name for pattern in patterns for one in _braces(pattern) for name in _find(one)]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"every shard must be named once, got {', '.join(repeated)} repeatedly.")
    if not any(_is_remote(name) or Path(name).exists() for name in names):
        raise ValueError(
            f"urls must name shards, got {urls!r}, {len(names)} names of which none exists (seen "
            f"from {Path.cwd()}). Correct the path; `python -m recipes.shard_writer` writes shards."
        )
    return names


def split_name(path: str) -> tuple[str, str]:
    """Returns the key and the extension of a file: `a/b.c.jpg` is `a/b` and `c.jpg`."""
    folder, slash, name = path.rpartition("/")
    stem, _, extension = name.partition(".")
    return folder + slash + stem, extension.lower()


def _braces(pattern: str) -> list[str]:
    """Returns what a pattern with braces stands for."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if numbers is None and "," not in found[1]:
        raise ValueError(
            f"braces hold a range {{000..123}} or a list {{a,b}}, got {found[0]} in {pattern!r}."
        )
    if numbers is None:
        choices = found[1].split(",")
    else:
        first, last = int(numbers[1]), int(numbers[2])
        if first > last:
            raise ValueError(
                f"a range goes from the smaller number to the larger one, got {found[0]} in "
                f"{pattern!r}."
            )
        choices = [f"{number:0{len(numbers[1])}}" for number in range(first, last + 1)]
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [name for choice in choices for name in _braces(before + choice + after)]


def _find(pattern: str) -> list[str]:
    if _is_remote(pattern):
        # A question mark begins the parameters of a URL.
        if "*" not in pattern and "[" not in pattern:
            return [pattern]
        files, _, _ = _fsspec().get_fs_token_paths(pattern)
        found = [files.unstrip_protocol(path) for path in sorted(files.glob(pattern))]
    else:
        path = Path(pattern).expanduser()
        if path.is_dir():
            found = sorted(str(p) for p in path.iterdir() if p.name.endswith(_SUFFIXES))
        elif glob.has_magic(pattern) and not path.exists():
            found = sorted(glob.glob(str(path), recursive=True))
        else:
            return [str(path)]
    if not found:
        raise ValueError(f"urls must match shards, got {pattern!r}: none.")
    return found


def _samples(url: str, *, start: int) -> Iterator[Sample | Problem]:
    """Reads the samples of a shard from a place on.

    Raises:
        OSError: It cannot be read, or no further.
    """
    with _open_archive(url) as archive:
        for row, (key, members) in enumerate(itertools.groupby(_members(archive), key=_key)):
            if row >= start:
                yield _sample(archive, url, key, members)


def _keys(url: str) -> Iterator[str]:
    with _open_archive(url) as archive:
        for key, _ in itertools.groupby(_members(archive), key=_key):
            yield key


def _sample(
    archive: tarfile.TarFile, url: str, key: str, members: Iterator[tarfile.TarInfo]
) -> Sample | Problem:
    sample, reason = Sample(__key__=key, __url__=url), ""
    try:
        for member in members:
            extension = split_name(member.name)[1]
            if extension in sample:
                reason = f"it has two members {extension!r}"
            sample[extension] = cast(BinaryIO, archive.extractfile(member)).read()
    # tarfile, gzip, zlib and the file systems behind fsspec raise errors of many kinds.
    except Exception as error:
        raise OSError(f"sample {key}: {_reason(error)}") from error
    return Problem(key, reason) if reason else sample


@contextlib.contextmanager
def _open_archive(url: str) -> Iterator[tarfile.TarFile]:
    """Opens a shard; errors of any kind become an OSError, FileNotFoundError stays one."""
    try:
        file = _open(url)
    except (FileNotFoundError, RuntimeError):
        raise
    except Exception as error:
        raise OSError(_reason(error)) from error
    with file:
        try:
            is_zipped = file.peek(2)[:2] == _GZIP
            stream = gzip.GzipFile(fileobj=file) if is_zipped else file
            # One that can seek skips what is not read; it never goes back.
            mode: Literal["r:", "r|"] = "r:" if stream.seekable() else "r|"
            archive = tarfile.open(fileobj=stream, mode=mode, tarinfo=_CheckedInfo)  # noqa: SIM115
        except Exception as error:
            raise OSError(_reason(error)) from error
        yield archive


def _open(url: str) -> io.BufferedReader:
    if not _is_remote(url):
        return open(url, "rb")
    return io.BufferedReader(_fsspec().open(url, "rb").open())


class _CheckedInfo(tarfile.TarInfo):
    """Tells the end of an archive from its damage, which tarfile passes over in silence."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> "_CheckedInfo":
        """Reads a header; a block of zeros is the end."""
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise
            cut = len(buf) < tarfile.BLOCKSIZE
            raise OSError("the archive is cut off" if cut else f"damaged: {error}") from error


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yields the files of an archive; hidden ones and those of webdataset itself hold no data."""
    while True:
        try:
            member = archive.next()
        except Exception as error:
            raise OSError(_reason(error)) from error
        if member is None:
            return
        # Otherwise the archive keeps all headers.
        archive.members.clear()  # type: ignore[attr-defined]
        name = member.name.rsplit("/", 1)[-1]
        is_data = not name.startswith(".") and not re.fullmatch(r"__[^/]*__", name)
        if member.isfile() and is_data:
            yield member


def _key(member: tarfile.TarInfo) -> str:
    return split_name(member.name)[0]


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and not error.errno:
        return str(error) or type(error).__name__
    return f"{type(error).__name__}: {error}"


def _is_remote(url: str) -> bool:
    return "://" in url


def _fsspec() -> Any:
    try:
        import fsspec
    except ImportError as error:
        raise RuntimeError(
            "shards behind URLs need the package fsspec. Install it with `pip install fsspec`."
        ) from error
    return fsspec
