"""Reads the documents of a text corpus, and says which split each belongs to.

`.jsonl` and `.parquet` files hold a document a row; any other file is one document, read as bytes.

Every document has a key: its path relative to its source, with `#row` behind it in a table.
Splits follow a hash of the key, so the same document lands in the same split on every machine and
after every re-installation. A document whose exact content was read before is dropped.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from longnet_zoo.text.pieces import read_pieces

from .text_files import SourceFile, check_pattern, find_files
from .text_tables import ColumnError, RowError, read_rows

__all__ = [
    "Corpus",
    "CorpusSummary",
    "Document",
    "Split",
    "read_documents",
    "split_of",
]

Split = Literal["train", "val", "test"]

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """A text that belongs together.

    Attributes:
        key: Name of the document within its source.
        text: Content, in bytes.
        file_index: Position of its file in the list that was read.
        row: Row in that file; for a text file the number of the piece, 0 if it was not cut.
    """

    key: str
    text: bytes
    file_index: int = 0
    row: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusSummary:
    """What a corpus turned out to hold.

    Attributes:
        fingerprint: Hash over split, key and content of all documents: figures are comparable
            where it is equal.
        num_documents: Documents per split.
        num_bytes: Bytes of text per split.
        num_duplicates: Documents dropped because their content had been read before.
        num_skipped: Files and rows that could not be read.
    """

    fingerprint: str
    num_documents: dict[str, int]
    num_bytes: dict[str, int]
    num_duplicates: int
    num_skipped: int

    def __str__(self) -> str:
        parts = ", ".join(
            f"{split} {count:,} documents {self.num_bytes[split] / 1e6:.2f} MB"
            for split, count in self.num_documents.items()
        )
        return (
            f"corpus {self.fingerprint}: {parts}; {self.num_duplicates:,} duplicates dropped, "
            f"{self.num_skipped:,} unreadable files or rows skipped"
        )


def read_documents(
    files: Sequence[SourceFile],
    *,
    column: str = "text",
    on_error: Literal["skip", "raise"] = "skip",
    start: tuple[int, int] = (0, 0),
    max_document_bytes: int | None = None,
    on_skip: Callable[[str], None] | None = None,
) -> Iterator[Document]:
    """Reads documents one after another; empty ones are left out.

    How many rows a table has lost, and why, is logged behind its last row.

    Args:
        files: Files to read, in this order.
        column: Column of `.jsonl` and `.parquet` files that holds the text.
        on_error: "skip" logs a file or row that cannot be read and goes on; "raise" stops.
        start: File and row to begin at.
        max_document_bytes: Cuts longer text files into documents of about this size; None holds
            any file as a whole.
        on_skip: Called with the name of every file or row skipped.

    Yields:
        The documents.

    Raises:
        ValueError: A table lacks the column, or the column holds no text; or with
            `on_error="raise"` a file or a row cannot be read.
    """
    for index in range(start[0], len(files)):
        file = files[index]
        tally = _Tally(file)
        first_row = start[1] if index == start[0] else 0
        try:
            for row, text in _read_file(file, column, first_row, max_document_bytes):
                key = f"{file.key}#{row}" if file.is_table else file.key
                if isinstance(text, bytes):
                    tally.num_read += 1
                    if text:
                        yield Document(key=key, text=text, file_index=index, row=row)
                    continue
                problem = RowError(f"row {row}: {text or 'no text'}")
                if text is not None and on_error == "raise":
                    raise problem
                tally.skip(problem)
                if on_skip is not None:
                    on_skip(key)
        except ColumnError:
            raise
        # Damaged tables raise ValueErrors of pyarrow.
        except (OSError, ValueError) as error:
            if on_error == "raise":
                raise ValueError(
                    f"on_error='raise' stops at what cannot be read, got {file.path}: {error}. "
                    "Remove it, or pass on_error='skip'."
                ) from error
            tally.rest = error
            if on_skip is not None:
                on_skip(file.key)
        tally.log()


@dataclasses.dataclass
class _Tally:
    """Counts the rows of a file that were read and skipped."""

    file: SourceFile
    num_read: int = 0
    num_skipped: int = 0
    first: Exception | None = None
    rest: Exception | None = None

    def skip(self, problem: Exception) -> None:
        self.num_skipped += 1
        self.first = self.first or problem

    def log(self) -> None:
        """Says what was lost, if anything."""
        path, read = self.file.path, f"{self.num_read:,} rows read"
        if self.num_skipped:
            lost = f"{self.num_skipped:,} skipped, first {self.first}"
            _log.warning("%s: %s, %s", path, read, lost)
        if self.rest is not None:
            before = f" ({read} before)" if self.num_read else ""
            _log.warning("skipped %s%s: %s", path, before, self.rest)


def _read_file(
    file: SourceFile, column: str, start: int, max_bytes: int | None
) -> Iterator[tuple[int, bytes | RowError | None]]:
    if file.is_table:
        return read_rows(file.path, column, start=start)
    return read_pieces(file.path, start=start, max_bytes=max_bytes)


def split_of(key: str, *, val_fraction: float, test_fraction: float) -> Split:
    """Returns the split of a document, which depends on its key and the fractions only.

    Changing one fraction moves no document between the two other splits.
    """
    # Names of files need not be UTF-8.
    digest = hashlib.sha256(key.encode(errors="surrogateescape")).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < test_fraction:
        return "test"
    return "val" if place >= 1 - val_fraction else "train"


class Corpus:
    """The documents of all splits, in a fixed order, each content once.

    Args:
        source: Where the documents are; see `find_files`.
        val_source: Where validation documents are; None takes `val_fraction` of `source`.
        test_source: Where test documents are; None takes `test_fraction` of `source`.
        pattern: Glob of the files to take, relative to each folder among the sources.
        column: Column of `.jsonl` and `.parquet` files that holds the text.
        val_fraction: Share of the documents of `source` held out for validation.
        test_fraction: Share of the documents of `source` held out for the test.
        on_error: "skip" or "raise" at files that cannot be read.

    Raises:
        ValueError: A source cannot be read, or `pattern` has no folder to apply to.
    """

    def __init__(
        self,
        *,
        source: str | Sequence[str] = "stdlib",
        val_source: str | Sequence[str] | None = None,
        test_source: str | Sequence[str] | None = None,
        pattern: str | None = None,
        column: str = "text",
        val_fraction: float = 0.1,
        test_fraction: float = 0.05,
        on_error: Literal["skip", "raise"] = "skip",
    ) -> None:
        # Held-out sources come first: what they hold is then a duplicate in the training text.
        sources: dict[Split, str | Sequence[str] | None] = {
            "val": val_source,
            "test": test_source,
            "train": source,
        }
        given = {split: place for split, place in sources.items() if place is not None}
        check_pattern(pattern, list(given.values()))
        self.files = {split: find_files(place, pattern=pattern) for split, place in given.items()}
        self.column = column
        self.on_error = on_error
        self._fractions = {
            "val_fraction": val_fraction if val_source is None else 0.0,
            "test_fraction": test_fraction if test_source is None else 0.0,
        }
        self._summary: CorpusSummary | None = None

    @property
    def summary(self) -> CorpusSummary:
        """Counts and fingerprint; known once `documents` has been read to its end."""
        if self._summary is None:
            raise RuntimeError("summary needs all documents to have been read: call documents().")
        return self._summary

    def split_of(self, key: str) -> Split:
        """Returns the split of a document of `source`."""
        return split_of(key, **self._fractions)

    def split_documents(
        self, split: Split, *, max_document_bytes: int | None = None
    ) -> Iterator[Document]:
        """Reads the documents of one split, duplicates included, without filling `summary`."""
        own = self.files.get(split) if split != "train" else None
        files = own if own is not None else self.files["train"]
        for document in read_documents(
            files,
            column=self.column,
            on_error=self.on_error,
            max_document_bytes=max_document_bytes,
        ):
            if own is not None or self.split_of(document.key) == split:
                yield document

    def file_fingerprint(self) -> str:
        """Returns a hash over names and sizes of all files, without reading them."""
        fingerprint = hashlib.sha256(repr(self._fractions).encode())
        for split, files in self.files.items():
            for file in files:
                # One that cannot be read is skipped later.
                size = file.path.stat().st_size if file.path.exists() else -1
                name = f"{split}:{file.key}:{size};"
                fingerprint.update(name.encode(errors="surrogateescape"))
        return fingerprint.hexdigest()[:12]

    def documents(self) -> Iterator[tuple[Split, Document]]:
        """Reads all documents and fills `summary`.

        Yields:
            Split and document: held-out sources first, then `source` in path order.

        Raises:
            ValueError: Nothing could be read.
        """
        seen: set[bytes] = set()
        skipped: list[str] = []
        num_documents: dict[str, int] = {"train": 0, "val": 0, "test": 0}
        num_bytes: dict[str, int] = {"train": 0, "val": 0, "test": 0}
        num_duplicates = 0
        fingerprint = hashlib.sha256()
        for split, document in self._read(skipped.append):
            digest = hashlib.sha256(document.text).digest()[:16]
            if digest in seen:
                num_duplicates += 1
                continue
            seen.add(digest)
            num_documents[split] += 1
            num_bytes[split] += len(document.text)
            name = f"{split}:{document.key}:"
            fingerprint.update(name.encode(errors="surrogateescape") + digest)
            yield split, document
        if not seen:
            num_files = sum(len(files) for files in self.files.values())
            raise ValueError(
                f"source must hold text, got {num_files} files, of which {len(skipped)} could not "
                f"be read and the others are empty{': ' + skipped[0] if skipped else ''}. Check "
                "the permissions and the content."
            )
        self._summary = CorpusSummary(
            fingerprint=fingerprint.hexdigest()[:12],
            num_documents=num_documents,
            num_bytes=num_bytes,
            num_duplicates=num_duplicates,
            num_skipped=len(skipped),
        )

    def _read(self, on_skip: Callable[[str], None]) -> Iterator[tuple[Split, Document]]:
        for role, files in self.files.items():
            for document in read_documents(
                files, column=self.column, on_error=self.on_error, on_skip=on_skip
            ):
                yield self.split_of(document.key) if role == "train" else role, document
