"""Reads examples from tables, folders of pictures and saved datasets, as a ``datasets.Dataset``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, Dataset, DatasetDict

from peftcore.errors import BadInput
from peftcore_lab.data.table_readers import read_rows
from peftcore_lab.data.texts import SPLIT_SEED
from peftcore_lab.digests import of_content

HELD_OUT = ("validation", "test", "valid", "dev", "eval")
"""Names of splits to score; the first one that the dataset has is used."""
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class ExampleSource:
    """The origin of a part of the examples, for error messages."""

    name: str
    file: str | None = None
    """The data from which the part was taken; None if the part is the whole data."""
    rows: Sequence[int] = ()
    """Positions of the part's examples in that data, counted from 0."""

    def __str__(self) -> str:
        return self.name

    def row(self, index: int) -> str:
        """Return a text that names an example's row in the user's data, counted from 1."""
        return f"{self.name}, row {index + 1}" if self.file is None else f"{self.file}, row {self.rows[index] + 1}"

    def selected(self, rows: Sequence[int]) -> ExampleSource:
        """Return the source of some of the examples, given by their positions in this part."""
        return ExampleSource(self.name, self.file or self.name, [self.rows[row] if self.rows else row for row in rows])


@dataclass(frozen=True)
class Splits:
    """Examples to train on, and a validation set."""

    train: Dataset
    held_out: Dataset
    names: tuple[ExampleSource, ExampleSource]

    @property
    def named(self) -> list[tuple[ExampleSource, Dataset]]:
        """Returns both parts with their sources."""
        return [*zip(self.names, (self.train, self.held_out), strict=True)]


def splits(train: str, held_out: str | None, size: int | None) -> Splits:
    """Read examples for training and for validation. Without `held_out`, the validation set is a split of the dataset,
    or `size` of the training examples (by default a fifth, at most 1,000).

    Raises:
        BadInput: the data cannot be read, or no training example is left.
    """
    names = ExampleSource(train), ExampleSource(f"{train} (held out)")
    source = read(train)
    pieces = source if isinstance(source, DatasetDict) else DatasetDict(train=source)
    if "train" not in pieces:
        raise BadInput(f"{train} has no split called train; its splits are {', '.join(pieces)}")
    if held_out is not None:
        return Splits(pieces["train"], scored(held_out), (ExampleSource(train), ExampleSource(held_out)))
    for name in HELD_OUT:
        if name in pieces:
            return Splits(pieces["train"], pieces[name], names)
    return divide(pieces["train"], size, train)


def scored(source: str) -> Dataset:
    """Read examples for validation: all examples of a source with one split, otherwise the first split whose name is in
    `HELD_OUT`.

    Raises:
        BadInput: the data cannot be read, or lacks such a split.
    """
    found = read(source)
    if isinstance(found, Dataset):
        return found
    names = [*found] if len(found) == 1 else [name for name in HELD_OUT if name in found]
    if not names:
        raise BadInput(
            f"{source} has no split to score, which is called {', '.join(HELD_OUT)}; its splits are "
            f"{', '.join(found)}. Pass the folder of one split, {Path(source) / [*found][-1]}, or save that split "
            "alone with save_to_disk of datasets"
        )
    return found[names[0]]


def divide(examples: Dataset, size: int | None, source: str) -> Splits:
    """Return splits with random examples held out for validation. The choice is the same each time for the same data.

    Raises:
        BadInput: no training example would be left.
    """
    wanted = min(1000, max(1, len(examples) // 5)) if size is None else size
    if wanted >= len(examples):
        raise BadInput(f"{source}: cannot hold out {wanted} of {len(examples)} rows: some must remain to train on")
    cut = Dataset.from_dict({"row": range(len(examples))}).train_test_split(test_size=wanted, seed=SPLIT_SEED)
    (train, held_out) = (cut[name]["row"][:] for name in ("train", "test"))
    names = ExampleSource(source, source, train), ExampleSource(f"{source} (held out)", source, held_out)
    return Splits(examples.select(train), examples.select(held_out), names)


def read(source: str) -> Dataset | DatasetDict:
    """Read a table, a folder, or a dataset of the Hub. Class numbers are replaced by class names.

    Raises:
        BadInput: the source cannot be read.
    """
    path = Path(source)
    if path.is_dir():
        found = _folder(path)
    elif path.exists() or path.suffix.lower() in READERS:
        reader = READERS.get(path.suffix.lower())
        if reader is None:
            raise BadInput(f"{path}: the data must be a folder or a file that ends in {', '.join(READERS)}")
        found = reader(path)
    else:
        found = _loaded(source, lambda: datasets.load_dataset(source))
    return named(found)


def digest(source: str) -> str | None:
    """Return a digest of the file or folder of a dataset. For a dataset on the Hub, return the commit that `read` would
    load now (without a network, the newest commit in the cache of `datasets`). Return None if there is neither a file
    nor such a dataset."""
    path = Path(source)
    if path.exists() or path.suffix.lower() in READERS:
        return of_content(source)
    try:
        return str(datasets.load_dataset_builder(source).hash)
    except Exception:  # of any type, as in `_loaded`; `read` says what is wrong
        return None


def _loaded(source: object, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # datasets raises whatever the reader below it raised
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise BadInput(f"{source}: cannot be read as a dataset ({type(error).__name__}: {reason})") from None


def _table(path: Path) -> Dataset:
    rows = read_rows(path)
    return _loaded(path, lambda: Dataset.from_list(rows))


def _lines(path: Path) -> Dataset:
    lines = _loaded(path, lambda: path.read_text(encoding="utf-8-sig").splitlines())
    return Dataset.from_list([{"text": line} for line in lines if line.strip()])


def _parquet(path: Path) -> Dataset:
    import pyarrow.parquet

    return _loaded(path, lambda: Dataset(pyarrow.parquet.read_table(path)))


READERS: Mapping[str, Callable[[Path], Dataset]] = {
    ".csv": _table,
    ".json": _table,
    ".jsonl": _table,
    ".ndjson": _table,
    ".parquet": _parquet,
    ".txt": _lines,
}


def _folder(path: Path) -> Dataset | DatasetDict:
    """Read a folder written by `Dataset.save_to_disk`, or a folder of pictures. Pictures are in subfolders named after
    their classes, or next to a ``metadata.csv`` or ``metadata.jsonl`` with their names in the column ``file_name``."""
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        return _loaded(path, lambda: datasets.load_from_disk(str(path)))
    if not any(file.suffix.lower() in PICTURES for file in path.rglob("*")):
        raise BadInput(f"{path} is neither a saved dataset nor a folder of pictures ({', '.join(PICTURES)})")
    return _loaded(path, lambda: _pictures(path))


def _pictures(path: Path) -> Dataset | DatasetDict:
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:  # the index would stay in the user's home otherwise
        found = datasets.load_dataset("imagefolder", data_dir=str(path), cache_dir=scratch, keep_in_memory=True)
    return found if len(found) > 1 else next(iter(found.values()))


def named(found: Dataset | DatasetDict) -> Dataset | DatasetDict:
    """Replace the numbers of classes by their names."""
    if isinstance(found, DatasetDict):
        return DatasetDict({name: named(piece) for name, piece in found.items()})
    if not len(found):
        raise BadInput("a dataset has no rows")
    for column, feature in found.features.items():
        if isinstance(feature, ClassLabel):
            names = [None if number is None else feature.int2str(number) for number in found[column]]
            found = found.remove_columns(column).add_column(column, names)
    return found
