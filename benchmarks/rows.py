"""The rows that benchmarks produce: one row a figure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.timing import Estimate


@dataclass(frozen=True)
class Row:
    """A figure of ours beside peft's."""

    figure: str
    ours: str
    theirs: str
    ratio: Estimate
    """Ours over theirs, of what the figure names."""
    wanted: float
    """The ratio is to be at most this; infinite where nothing is wanted."""

    @property
    def goal(self) -> str:
        """Return the wanted figure as text."""
        return "" if math.isinf(self.wanted) else f"≤ {self.wanted:g}"

    @property
    def reached(self) -> bool:
        return self.ratio.value <= self.wanted
