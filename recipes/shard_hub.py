"""Samples of a Hugging Face dataset, streamed, for the loaders of `recipes.shards`.

    source = HubSource("parquet", data_files="captions/*.parquet")
    loader = ShardLoader(source, decode, batch_size=64)

The parts of a sample are the columns, images and audio undecoded, as in tar shards. A dataset comes
in shards, its files as a rule, and a row has a place in its shard: that is the position to go on
from. `datasets` repeats reads of the Hub that fail by itself.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from .shard_files import Problem, Sample

__all__ = ["HubSource"]


class HubSource:
    """Rows of a dataset on the Hugging Face Hub, or of local files.

    Args:
        path: Name on the Hub, or "parquet", "json" and so on for `data_files`.
        name: Configuration of the dataset.
        split: Which split.
        data_files: Files to read, paths, URLs or globs.
        revision: Commit or branch on the Hub.

    Raises:
        RuntimeError: The package `datasets` is not installed.
        ValueError: The dataset cannot be opened.
    """

    def __init__(
        self,
        path: str,
        *,
        name: str | None = None,
        split: str = "train",
        data_files: str | Sequence[str] | None = None,
        revision: str | None = None,
    ) -> None:
        try:
            import datasets
        except ImportError as error:
            raise RuntimeError(
                f"streaming {path!r} needs the package datasets. Install it with `pip install "
                "datasets`."
            ) from error
        try:
            data = datasets.load_dataset(
                path, name, split=split, data_files=data_files, revision=revision, streaming=True
            )
        # pyarrow, datasets and the file systems behind them raise errors of many kinds.
        except Exception as error:
            raise ValueError(
                f"the dataset {path!r} cannot be opened: {type(error).__name__}: {error}. Check "
                "its name, the split and the files."
            ) from error
        for column, feature in (data.features or {}).items():
            if isinstance(feature, datasets.Image):
                data = data.cast_column(column, datasets.Image(decode=False))
            elif isinstance(feature, datasets.Audio):
                data = data.cast_column(column, datasets.Audio(decode=False))
        self._data = data
        self.shards: Sequence[str] = _files(data) or [
            f"{path} {split} shard {shard}" for shard in range(data.num_shards)
        ]

    def rows(self, shard: int, *, start: int = 0) -> Iterator[Sample | Problem]:
        """Reads a shard from a row on; see `RowSource`."""
        rows = self._rows(shard, start=start)
        for row, record in enumerate(rows, start):
            sample = Sample(__key__=str(row), __url__=self.shards[shard])
            try:
                sample.update((key, _content(value)) for key, value in record.items())
            except Exception as error:
                yield Problem(str(row), f"{type(error).__name__}: {error}")
                continue
            # Null is no content: to ask for it then says so.
            yield Sample((key, value) for key, value in sample.items() if value is not None)

    def num_rows(self, shard: int) -> int:
        """Counts the rows of a shard, by reading one column; see `RowSource`."""
        number = 0
        try:
            for _ in self._rows(shard, columns=(self._data.column_names or [])[:1]):
                number += 1
        except OSError:
            number += 1
        return max(number, 1)

    def _rows(
        self, shard: int, *, start: int = 0, columns: Sequence[str] = ()
    ) -> Iterator[dict[str, Any]]:
        try:
            data = self._data.shard(len(self.shards), shard)
            data = data.select_columns(list(columns)) if columns else data
            # Not `iter(data)`, which deals the shards out to worker processes once more.
            for batch in data.skip(start).iter(batch_size=1):
                yield {key: values[0] for key, values in batch.items()}
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error


def _files(data: Any) -> list[str]:
    """Returns the file of each shard, for the log; nothing where `datasets` does not tell."""
    options = getattr(getattr(data, "_ex_iterable", None), "kwargs", {})
    # Parquet has the first, lines of JSON have the others.
    found = options.get("files", options.get("original_files", options.get("base_files")))
    is_known = isinstance(found, list) and len(found) == data.num_shards
    return [str(name) for name in found] if is_known else []


def _content(value: Any) -> Any:
    """Returns the bytes of an undecoded image or sound, which may lie in a file of its own."""
    if not isinstance(value, dict) or value.keys() != {"bytes", "path"}:
        return value
    if value["bytes"] is not None or value["path"] is None:
        return value["bytes"]
    import fsspec

    with fsspec.open(value["path"], "rb") as file:
        return file.read()
