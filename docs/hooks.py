"""What MkDocs needs beyond its plugins: an API reference by `__all__`, pictures of benchmarks.

A page with the line `::: PACKAGE` becomes the reference of every public name of that package, so a
new name appears by itself. Pages link to pictures of the benchmarks, which lie outside of docs/,
as `../benchmarks/results/NAME`: right in the repository, and mended here for the site.
"""

import importlib
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
PICTURES = (".png", ".svg")


def on_files(files: Files, *, config: Any) -> Files:
    """Adds the pictures of the benchmarks as `benchmarks/results/NAME`."""
    for path in sorted(RESULTS.rglob("*")):
        if path.suffix in PICTURES:
            place = f"benchmarks/results/{path.relative_to(RESULTS).as_posix()}"
            files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Mends links to the pictures and writes the entries of the reference."""
    markdown = markdown.replace("](../benchmarks/results/", "](benchmarks/results/")
    return re.sub(
        r"^::: ([\w.]+)$", lambda found: "\n".join(_entries(found[1])), markdown, flags=re.MULTILINE
    )


def _entries(package: str) -> Iterator[str]:
    module = importlib.import_module(package)
    for name in module.__all__:
        value, path = getattr(module, name), f"{package}.{name}"
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            yield f"## `{name}` {{ #{path} }}\n\n```python\n{name} = {_written(value)}\n```\n"
            continue
        folder, _, file = value.__module__.rpartition(".")
        if file != name:
            yield f"::: {path}\n"
            continue
        # A module has the same name, and would be taken instead.
        entry = f"[](){{ #{path} }}\n\n::: {value.__module__}.{name}\n"
        # References lead to one place, that of the package that it is defined in.
        is_home = folder == package
        yield entry if is_home else f"{entry}    options:\n      skip_local_inventory: true\n"


def _written(value: object) -> str:
    """Writes a constant or an alias of types; of a mapping the keys."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: ..." for key in value) + "}"
    return re.sub(r"\b(typing|collections\.abc|torch)\.", "", repr(value))
