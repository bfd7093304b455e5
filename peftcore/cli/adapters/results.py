"""Results of the jobs on adapter files; light to import, for the code that prints them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from peftcore.algebra.exporting import Export
from peftcore.injection.merging import MergeReport

NATIVE = "native"
OURS = "peftcore"
"""The name in `formats()` of the files that we call native."""


def shown_format(name: str) -> str:
    """Return a format as the command line calls it."""
    return NATIVE if name == OURS else name


@dataclass(frozen=True)
class MergedAdapter:
    """One adapter that is merged into the weights now."""

    adapter: str
    method: str
    weight: float
    sites: int
    report: MergeReport


@dataclass(frozen=True)
class Converted:
    """One adapter that was written in another format."""

    adapter: str
    was: str
    now: str
    method: str
    sites: int
    values: int
    model: Path
    weights: bool
    """Whether the model's weights had to be loaded."""
    files: tuple[str, ...]


@dataclass(frozen=True)
class Exported:
    """One adapter that was written as a LoRA."""

    adapter: str
    method: str
    rank: int
    format: str
    errors: dict[str, float]
    """Relative errors by site: norm of the lost part over norm of the change."""
    values: int
    files: tuple[str, ...]


@dataclass(frozen=True)
class ForReader:
    """One adapter that was written for another program."""

    adapter: str
    method: str
    done: Export
    files: tuple[str, ...]
