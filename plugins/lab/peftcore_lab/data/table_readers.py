"""Readers of the rows of a CSV, JSON or JSONL file."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from peftcore.errors import BadInput


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file, whose suffix determines the format. A CSV file has commas and a header line, a JSONL
    file one object per line. A JSON file is a list of objects, or an object that contains one such list."""
    readers = {".csv": read_csv, ".json": read_json, ".jsonl": read_jsonl, ".ndjson": read_jsonl}
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


def read_json(text: str) -> list[dict[str, Any]]:
    try:
        held = json.loads(text)
    except json.JSONDecodeError as error:
        if "\n{" in text.strip():
            return read_jsonl(text)  # under another name
        raise ValueError(f"not JSON: {error.msg} in line {error.lineno}") from error
    lists = [each for each in held.values() if isinstance(each, list)] if isinstance(held, dict) else [held]
    if len(lists) != 1 or not isinstance(lists[0], list):
        raise ValueError("a JSON file of examples is a list of objects, or an object that holds one such list")
    if wrong := [number for number, row in enumerate(lists[0], start=1) if not isinstance(row, dict)]:
        raise ValueError(f"entry {wrong[0]} is not a JSON object")
    rows: list[dict[str, Any]] = lists[0]
    return rows


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
