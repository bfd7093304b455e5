"""Labelled texts: read a CSV or JSONL file, split it, tokenize it."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from peftcore.cli.errors import BadInput

TEXT_NAMES = ("text", "sentence", "content", "tweet", "review", "body", "message")
LABEL_NAMES = ("label", "labels", "class", "target", "sentiment", "category")
SPLIT_SEED = 0
"""The split does not depend on the seed of a run: what is held out stays held out."""


class Example(NamedTuple):
    text: str
    label: str


Encoded = dict[str, Any]
"""One tokenized text, as the model takes it: ``input_ids``, ``attention_mask``, ``labels``."""


@dataclass(frozen=True)
class Task:
    """A classification task: texts to train on, texts held out, the classes in the order of their numbers."""

    source: str
    train: list[Example]
    held_out: list[Example]
    labels: tuple[str, ...]

    @property
    def majority(self) -> float:
        """Accuracy on the held-out texts of always answering the commonest class of the training texts."""
        counts = {label: sum(example.label == label for example in self.train) for label in self.labels}
        commonest = max(self.labels, key=counts.__getitem__)
        return sum(example.label == commonest for example in self.held_out) / len(self.held_out)


def make_task(source: str, train: list[Example], held_out: list[Example]) -> Task:
    """Number the classes (integers by value, words by alphabet) and refuse what cannot be learned or scored."""
    labels = {example.label for example in (*train, *held_out)}
    if len(labels) < 2:
        raise BadInput(f"{source}: every row has the label {labels.pop()!r}; a comparison needs at least two classes")
    if len(labels) > len(train) // 2:
        raise BadInput(f"{source}: {len(labels)} labels on {len(train)} training rows; is that the label column?")
    unseen = labels - {example.label for example in train}
    if unseen:
        raise BadInput(f"{source}: no training row has the label {min(unseen)!r}; give more rows, hold out fewer")
    return Task(source, train, held_out, tuple(sorted(labels, key=label_order)))


def label_order(label: str) -> tuple[bool, int, str]:
    number = label.removeprefix("-").isdecimal()
    return (not number, int(label) if number else 0, label)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV file (comma, a header line) or a JSONL file (one object a line), chosen by the suffix."""
    readers = {".csv": read_csv, ".jsonl": read_jsonl, ".ndjson": read_jsonl}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise BadInput(f"{path}: the data must be a file that ends in {', '.join(readers)}")
    try:
        rows = reader(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8 and try again") from error
    except (csv.Error, ValueError) as error:
        raise BadInput(f"{path}: {error}") from error
    if not rows:
        raise BadInput(f"{path}: holds no rows")
    return rows


def read_csv(text: str) -> list[dict[str, Any]]:
    return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))


def read_jsonl(text: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} is not JSON: {error.msg}") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is not a JSON object")
        rows.append(row)
    return rows


def choose_column(columns: Sequence[str], wanted: str | None, names: Sequence[str], kind: str, path: object) -> str:
    """The column the user named, or the first whose name is one of ``names`` (in any case)."""
    if wanted is not None:
        if wanted in columns:
            return wanted
        raise BadInput(f"{path}: no column {wanted!r}; its columns are {', '.join(columns)}")
    by_name = {column.lower(): column for column in reversed(columns)}
    for name in names:
        if name in by_name:
            return by_name[name]
    raise BadInput(f"{path}: name the {kind} with data.{kind}; its columns are {', '.join(columns)}")


def filled(row: dict[str, Any], column: str) -> bool:
    value = row.get(column)
    return value is not None and str(value).strip() != ""


def split(examples: Iterable[Example], sizes: Sequence[int]) -> list[list[Example]]:
    """Shuffle with a fixed seed and cut pieces of the given sizes; one piece more holds the rest and is never empty."""
    pool = list(examples)
    if sum(sizes) >= len(pool):
        raise BadInput(f"cannot hold out {sum(sizes)} of {len(pool)} rows: some must remain to train on")
    random.Random(SPLIT_SEED).shuffle(pool)
    pieces, start = [], 0
    for size in sizes:
        pieces.append(pool[start : start + size])
        start += size
    return [*pieces, pool[start:]]


def encode(tokenizer: Any, examples: Sequence[Example], labels: Sequence[str], max_length: int) -> list[Encoded]:
    """Tokenize and cut at ``max_length`` tokens; the collator pads each batch to its own longest text."""
    number = {label: index for index, label in enumerate(labels)}
    columns = dict(tokenizer([example.text for example in examples], truncation=True, max_length=max_length))
    if len(examples) > 1 and all(ids == columns["input_ids"][0] for ids in columns["input_ids"]):
        raise BadInput("the tokenizer reads every text alike; is its vocabulary in the model folder?")
    return [
        {**{name: values[row] for name, values in columns.items()}, "labels": number[example.label]}
        for row, example in enumerate(examples)
    ]
