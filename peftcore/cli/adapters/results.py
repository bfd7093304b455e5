"""Results of the jobs on adapter files. The module imports no heavy libraries, so that code that prints results starts
quickly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from peftcore.algebra.exporting import Export
from peftcore.injection.merging import MergeReport

NATIVE = "native"
OURS = "peftcore"
"""The name in `formats()` of the format that the command line calls native."""


def shown_format(name: str) -> str:
    """Return the command line's name for a format."""
    return NATIVE if name == OURS else name


@dataclass(frozen=True)
class MergedAdapter:
    """An adapter that was merged into the weights."""

    adapter: str
    method: str
    weight: float
    sites: int
    report: MergeReport


@dataclass(frozen=True)
class Converted:
    """An adapter that was saved in another format."""

    adapter: str
    was: str
    now: str
    method: str
    sites: int
    values: int
    model: Path
    weights: bool
    """True if the model's weights had to be loaded."""
    files: tuple[str, ...]


@dataclass(frozen=True)
class Exported:
    """An adapter that was saved as a LoRA."""

    adapter: str
    method: str
    rank: int
    format: str
    errors: dict[str, float]
    """Relative errors by site: the norm of the lost part over the norm of the weight change."""
    values: int
    files: tuple[str, ...]


@dataclass(frozen=True)
class ForReader:
    """An adapter that was saved for another program."""

    adapter: str
    method: str
    done: Export
    files: tuple[str, ...]
