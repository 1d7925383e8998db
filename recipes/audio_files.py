"""The recordings of an audio task: where they are, what they hold, which split each is in.

What a source holds is said in one way, a `Recording` each: a class of the whole, or events with
start and end, or a transcript.
"""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from .audio_tables import read_table
from .text_corpus import split_of

__all__ = ["SAMPLES", "Event", "Recording", "find_audio", "load_recordings"]

Split = Literal["train", "val", "test"]
Splits = dict[Split, tuple["Recording", ...]]

SAMPLES = Path(__file__).parent / "assets" / "audio"
_SPLITS: tuple[Split, ...] = ("train", "val", "test")

# What soundfile's libsndfile reads, of what is used for recordings.
_EXTENSIONS = {".aif", ".aiff", ".au", ".caf", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".wav"}
_TABLES = {".csv", ".jsonl"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """Something that is heard from `start` to `end`.

    Attributes:
        tag: Its class.
        start: Seconds since the beginning of the recording.
        end: Likewise.
    """

    tag: str
    start: float
    end: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recording:
    """A file with sound, or a part of one, and what is known of it.

    Attributes:
        path: The file.
        key: What decides its split, where nothing else does.
        label: Class of the whole; None where it has none.
        events: What is heard when; None where nobody says, () for nothing.
        transcript: What is said; None where nobody says.
        start: Where the part begins, in seconds.
        end: Where it ends; None at the end of the file.
    """

    path: str
    key: str
    label: str | None = None
    events: tuple[Event, ...] | None = None
    transcript: str | None = None
    start: float = 0.0
    end: float | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes it names."""
        tags = () if self.events is None else tuple(event.tag for event in self.events)
        return tags if self.label is None else (self.label, *tags)


def load_recordings(
    source: str,
    *,
    val_source: str | None,
    test_source: str | None,
    val_fraction: float,
    test_fraction: float,
    num_families: int,
    class_names: Sequence[str] | None,
) -> tuple[tuple[str, ...], Splits]:
    """Finds the recordings of all splits; files are not opened yet.

    Args:
        source: "samples" (single sounds that come with the recipe); a folder with a subfolder for
            each class, or one with such folders in `train`, `val` and `test`; or a table (see
            `audio_tables`), whose column `split` does the same.
        val_source: Where validation recordings are, a folder or table; None takes those of
            `source`.
        test_source: The same of the test.
        val_fraction: Share held out for validation where the source has no such split. Which
            recordings is decided by a hash of their path below the source, so parts of a file stay
            together; of "samples" that share is taken from each family.
        test_fraction: Share held out for the test where the source has no splits.
        num_families: How many of the largest families of "samples" are used.
        class_names: The classes in their order; None takes those of the training recordings,
            sorted.

    Returns:
        Names of the classes, and the recordings of each split.

    Raises:
        ValueError: A source has no such layout, or a class has no training recordings.
    """
    fractions = {
        "val_fraction": val_fraction if val_source is None else 0.0,
        "test_fraction": test_fraction if test_source is None else 0.0,
    }
    if source == "samples":
        splits = _families(num_families, **fractions)
    else:
        splits = _read_source(source, fractions)
    for split, own in (("val", val_source), ("test", test_source)):
        if own is not None:
            splits[split] = tuple(x for part in _all_splits(own).values() for x in part)
    counts = Counter(name for recording in splits["train"] for name in recording.classes)
    classes = tuple(sorted(counts)) if class_names is None else tuple(class_names)
    _check_classes(source, classes, counts, splits)
    return classes, splits


def find_audio(source: str) -> tuple[Recording, ...]:
    """Lists the audio files below a folder, sorted, or the one file given.

    Raises:
        ValueError: There are none.
    """
    path = Path(source)
    paths = [path] if path.is_file() else _audio_paths(path)
    if not paths:
        raise ValueError(
            f"{source!r} must be an audio file or a folder with some, and there is none. Files "
            f"with one of {' '.join(sorted(_EXTENSIONS))} are read."
        )
    return tuple(Recording(path=str(p), key=p.name) for p in paths)


def _families(number: int, *, val_fraction: float, test_fraction: float) -> Splits:
    """Splits each of the largest families, so that small ones are in every split."""
    paths = sorted(SAMPLES.glob("*.ogg"))
    sizes = Counter(path.name.split("_")[0] for path in paths)
    if not 2 <= number <= len(sizes):
        raise ValueError(f"num_families must be in [2, {len(sizes)}], got {number}.")
    splits: dict[Split, list[Recording]] = {"train": [], "val": [], "test": []}
    for family, size in sizes.most_common(number):
        own = [path for path in paths if path.name.split("_")[0] == family]
        # Names count kinds of a sound, so neighbours are alike.
        own.sort(key=lambda path: hashlib.sha256(path.name.encode()).digest())
        num_test, num_val = round(size * test_fraction), round(size * val_fraction)
        for place, path in enumerate(own):
            split = _SPLITS[2 if place < num_test else 1 if place < num_test + num_val else 0]
            splits[split].append(Recording(path=str(path), key=path.name, label=family))
    return {split: tuple(own) for split, own in splits.items()}


def _read_source(source: str, fractions: dict[str, float]) -> Splits:
    """Reads a folder or table; what has no split gets one by the hash of its key."""
    splits = _all_splits(source)
    has_splits = bool(splits["train"])
    given = {} if not has_splits else {"test_fraction": 0.0}
    given |= {"val_fraction": 0.0} if splits["val"] else {}
    loose = splits.pop("train") if has_splits else splits.pop("none")
    found: dict[Split, list[Recording]] = {"train": [], "val": [], "test": []}
    for recording in loose:
        found[split_of(recording.key, **{**fractions, **given})].append(recording)
    for split in ("val", "test"):
        found[split] += splits[split]
    return {split: tuple(own) for split, own in found.items()}


def _all_splits(source: str) -> dict[str, tuple[Recording, ...]]:
    """Returns the recordings of `train`, `val`, `test` and of "none" of them."""
    path = Path(source)
    found: dict[str, list[Recording]] = {name: [] for name in (*_SPLITS, "none")}
    if path.suffix.lower() in _TABLES:
        for split, recording in _table(path):
            found[split].append(recording)
        if found["none"] and any(found[split] for split in _SPLITS):
            raise ValueError(
                f"all rows of a table need a split or none, got {len(found['none'])} without one "
                f"in {source}."
            )
    elif path.is_dir():
        if (path / "train").is_dir():
            for split in _SPLITS:
                found[split] = _folder(path / split, root=path)
        else:
            found["none"] = _folder(path, root=path)
    else:
        raise ValueError(
            "source must be 'samples', a folder with a subfolder for each class, or a .csv or "
            f".jsonl table, got {source!r}. Pass its path as data.source."
        )
    if not any(found.values()):
        raise ValueError(
            f"{source!r} holds no recordings. A folder needs a subfolder for each class, with "
            f"files that end in one of {' '.join(sorted(_EXTENSIONS))}."
        )
    return {name: tuple(own) for name, own in found.items()}


def _table(path: Path) -> list[tuple[str, Recording]]:
    """Makes recordings of the rows of a table; events of a file are one recording."""
    found: list[tuple[str, Recording]] = []
    events: dict[str, tuple[str, list[Event]]] = {}
    for row in read_table(path):
        file = str(path.parent / row.path)
        if row.tag is None:
            options = {"label": row.label, "transcript": row.transcript}
            times = {"start": row.start or 0.0, "end": row.end}
            found.append((row.split, Recording(path=file, key=row.path, **options, **times)))
            continue
        split, own = events.setdefault(row.path, (row.split, []))
        if split != row.split:
            raise ValueError(
                f"the events of a file must be in one split, got {row.path} in {split!r} and "
                f"{row.split!r} in {path}."
            )
        if row.tag:  # "" says that nothing is heard
            own.append(Event(tag=row.tag, start=row.start or 0.0, end=row.end or 0.0))
    return found + [
        (split, Recording(path=str(path.parent / name), key=name, events=tuple(own)))
        for name, (split, own) in events.items()
    ]


def _folder(folder: Path, *, root: Path) -> list[Recording]:
    if not folder.is_dir():
        return []
    return [
        Recording(path=str(path), key=path.relative_to(root).as_posix(), label=name.name)
        for name in sorted(folder.iterdir())
        if name.is_dir() and not name.name.startswith(".")
        for path in _audio_paths(name)
    ]


def _audio_paths(folder: Path) -> list[Path]:
    """Lists the audio files below a folder, sorted; hidden ones are no files of the user's."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in _EXTENSIONS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _check_classes(
    source: str, classes: tuple[str, ...], counts: Counter[str], splits: Splits
) -> None:
    if not splits["train"]:
        raise ValueError(
            f"training needs recordings, got none in {source!r}. Add some, or lower "
            "data.val_fraction and data.test_fraction."
        )
    if not counts:  # transcripts
        return
    empty = [name for name in classes if not counts[name]]
    if empty or len(classes) < 2:
        raise ValueError(
            f"two or more classes, each with training recordings, are needed, got "
            f"{', '.join(classes)} in {source!r} and none for {', '.join(empty) or 'a second'}. "
            "Add some, or lower data.val_fraction and data.test_fraction."
        )
    for split, own in splits.items():
        unknown = sorted({name for recording in own for name in recording.classes} - set(classes))
        if unknown:
            raise ValueError(
                f"every class needs training recordings, got {', '.join(unknown)} among those of "
                f"{split} and the classes {', '.join(classes)}."
            )
