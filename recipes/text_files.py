"""Lists the files that make up a text corpus.

A source is one of:

- `"stdlib"`: the `.py` files of the running interpreter's standard library (PSF licence);
- `"python"`: the same and the installed packages of `PACKAGES` (PSF, BSD-3, Apache-2.0);
- a folder, searched recursively; a file; or a glob such as `"books/**/*.txt"`.

A folder that is called `stdlib` is written `./stdlib`.
"""

import dataclasses
import glob
import importlib.util
import logging
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from .text_tables import TABLE_SUFFIXES

__all__ = ["PACKAGES", "TEXT_SUFFIXES", "SourceFile", "check_pattern", "find_files"]

# Installed with torch and Lightning, so that most machines which train have them.
PACKAGES = ("torch", "sympy", "networkx", "numpy", "lightning")

TEXT_SUFFIXES = (
    *(".txt", ".text", ".md", ".rst", ".tex", ".html", ".htm", ".xml", ".css"),
    *(".py", ".pyi", ".pyx", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cu", ".cuh", ".java"),
    *(".js", ".jsx", ".ts", ".tsx", ".go", ".rs", ".rb", ".php", ".pl", ".lua", ".jl", ".r", ".sh"),
    *(".scala", ".kt", ".swift", ".cs", ".hs", ".ml", ".sql", ".yaml", ".yml", ".toml"),
)

# Third-party code is not the corpus that was asked for.
_SKIPPED_FOLDERS = ("site-packages", "dist-packages", "__pycache__", "node_modules")

# `pydoc_data` holds the language reference as one string: English prose, and with 0.75 MB the
# largest file by far, so that the held-out figures would hang on the split it falls into.
_SKIPPED_FOLDERS_STDLIB = (*_SKIPPED_FOLDERS, "pydoc_data")

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file of a corpus.

    Attributes:
        key: Path relative to its source, with forward slashes; splits hang on it.
        path: Where the file lies.
    """

    key: str
    path: Path

    @property
    def is_table(self) -> bool:
        """Whether each row is a document, and not the whole file."""
        return self.path.suffix.lower() in TABLE_SUFFIXES


def find_files(source: str | Sequence[str], *, pattern: str | None = None) -> list[SourceFile]:
    """Lists the files of a source, in path order.

    Args:
        source: "stdlib", "python", a folder, a file, a glob, or a list of those.
        pattern: Glob, relative to each folder of `source`, of the files to take; what it matches
            is read whatever its suffix. None takes the known suffixes, recursively, except in
            hidden folders and installed packages.

    Returns:
        The files, sources in the order given.

    Raises:
        ValueError: A source does not exist, cannot be read, or holds no file to take.
    """
    sources = [source] if isinstance(source, str) else list(source)
    if not sources:
        raise ValueError(f"source must name at least one place, got {source!r}.")
    return [file for name in sources for file in _find(name, pattern)]


def check_pattern(pattern: str | None, sources: list[str | Sequence[str]]) -> None:
    """Refuses a pattern that no source would use.

    Args:
        pattern: Glob of the files to take from folders, or None.
        sources: All sources of a corpus, each a name or a list of names.

    Raises:
        ValueError: There is a pattern, and none of the sources is a folder.
    """
    names = [name for place in sources for name in ([place] if isinstance(place, str) else place)]
    if pattern is not None and not any(Path(name).expanduser().is_dir() for name in names):
        raise ValueError(
            f"pattern applies to folders, got pattern={pattern!r} and no folder among {names}. "
            "Leave it out, or write the glob as source."
        )


def _find(source: str, pattern: str | None) -> list[SourceFile]:
    if source in ("stdlib", "python"):
        return _python_files(PACKAGES if source == "python" else ())
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder_files(path, pattern)
    if path.is_file():
        return _checked([SourceFile(key=path.name, path=path)], source)
    if not glob.has_magic(source):
        raise ValueError(
            f"source must exist, got {source!r}, which is no file, folder or glob (seen from "
            f"{Path.cwd()}). Correct the path, or use source='stdlib'."
        )
    return _glob_files(source)


def _python_files(packages: Sequence[str]) -> list[SourceFile]:
    """Lists the standard library and those of the packages that are installed."""
    roots = {"stdlib": Path(sysconfig.get_paths()["stdlib"])}
    for name in packages:
        # Finds a package without importing it.
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            roots[name] = Path(spec.submodule_search_locations[0])
    files = [
        SourceFile(key=f"{name}/{path.relative_to(root).as_posix()}", path=path)
        for name, root in roots.items()
        for path in _walk(root, _SKIPPED_FOLDERS_STDLIB)
        if path.suffix == ".py"
    ]
    if not files:
        raise ValueError(
            f"source='stdlib' found no .py file in {roots['stdlib']}: this Python comes without "
            "its source. Pass source=<a folder of text>."
        )
    return files


def _folder_files(folder: Path, pattern: str | None) -> list[SourceFile]:
    known = TABLE_SUFFIXES + TEXT_SUFFIXES
    if pattern is None:
        paths = [path for path in _walk(folder) if path.suffix.lower() in known]
    else:
        paths = _match(folder, pattern)
    if not paths:
        wanted = f"pattern={pattern!r}" if pattern else f"the suffixes {' '.join(known)}"
        raise ValueError(
            f"source must hold files to read, got {str(folder)!r}, where none matches {wanted}. "
            "Pass pattern='**/*.suffix' of your files."
        )
    keys = {path.relative_to(folder).as_posix(): path for path in paths}
    return [SourceFile(key=key, path=keys[key]) for key in sorted(keys)]


def _match(folder: Path, pattern: str) -> list[Path]:
    _list_folder(folder)
    try:
        paths = [path for path in folder.glob(pattern) if path.is_file()]
    except (ValueError, NotImplementedError) as error:
        reason = str(error)
    else:
        if ".." not in Path(pattern).parts:
            return paths
        reason = "it leads out of the folder"
    raise ValueError(
        f"pattern must be a glob relative to the folder {str(folder)!r}, got pattern={pattern!r}: "
        f"{reason}. Write it like '**/*.txt', or pass the whole glob as source."
    )


def _walk(folder: Path, skipped: Sequence[str] = _SKIPPED_FOLDERS) -> Iterator[Path]:
    """Yields the files below `folder`, leaving out hidden and installed ones."""
    _list_folder(folder)

    def report(error: OSError) -> None:
        _log.warning("skipped the folder %s: %s", error.filename, error.strerror)

    for parent, folders, files in os.walk(folder, onerror=report):
        folders[:] = sorted(
            name for name in folders if name not in skipped and not name.startswith(".")
        )
        yield from (Path(parent, name) for name in sorted(files))


def _list_folder(folder: Path) -> None:
    try:
        os.scandir(folder).close()
    except OSError as error:
        raise ValueError(
            f"source must be readable, got the folder {str(folder)!r}: {error.strerror}. Change "
            "its permissions or pass another source."
        ) from error


def _glob_files(pattern: str) -> list[SourceFile]:
    expanded = os.path.expanduser(pattern)
    found = sorted(path for path in glob.glob(expanded, recursive=True) if os.path.isfile(path))
    if not found:
        raise ValueError(f"source must match at least one file, got the glob {pattern!r}: none.")
    # Keys start behind the part without wildcards, so that moving the folder changes no split.
    fixed = expanded[: min(expanded.find(sign) for sign in "*?[" if sign in expanded)]
    base = os.path.dirname(fixed) or "."
    files = [
        SourceFile(key=Path(os.path.relpath(path, base)).as_posix(), path=Path(path))
        for path in found
    ]
    return _checked(files, pattern)


def _checked(files: list[SourceFile], source: str) -> list[SourceFile]:
    known = TABLE_SUFFIXES + TEXT_SUFFIXES
    unknown = {file.path.suffix for file in files if file.path.suffix.lower() not in known}
    if unknown:
        raise ValueError(
            f"source={source!r} names files of a kind that is not known: {sorted(unknown)}; known "
            f"are {' '.join(known)}. To read any file as plain text pass its folder as source "
            "and pattern='*.suffix'."
        )
    return files
