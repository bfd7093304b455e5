"""Formats numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Iterable

SPACE = "\N{NO-BREAK SPACE}"


def digits(value: float) -> str:
    """Format a number with three significant digits: 0.210, 1.50, 100."""
    return f"{value:#.3g}".rstrip(".")


def size(count: float) -> str:
    """Format a number of bytes with three digits and a decimal unit, such as MB."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{digits(value)}{SPACE}{units[0]}"


def work(count: float) -> str:
    """Format a number of floating-point operations with three digits and a decimal unit, such as GFLOP."""
    value, units = float(count), ["", "k", "M", "G", "T", "P", "E"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{digits(value)}{SPACE}{units[0]}FLOP"


def short(count: float) -> str:
    """Format a count of parameters: 1k, 2.5M, 7B."""
    value, units = float(count), ["", "k", "M", "B", "T"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g}{units[0]}"


def percent(share: float) -> str:
    """Format a share in percent, with three significant digits even if it is very small."""
    return f"{digits(100 * share)}%"


def decimals(values: Iterable[float]) -> int:
    """Return the number of decimals for a column of numbers: three for 0.912, two if the largest is 12.3, none for
    54,321."""
    sizes = [abs(value) for value in values if math.isfinite(value)] or [0.0]
    places = max(0, 3 - math.floor(math.log10(max(1.0, min(sizes)))))
    return places if max(sizes) < 10 else min(places, 2)


def fixed(value: float, places: int) -> str:
    """Format a number with `places` digits after the point; infinities become "∞" or "−∞", and NaN becomes "not a
    number"."""
    return (
        f"{value:,.{places}f}" if math.isfinite(value) else {math.inf: "∞", -math.inf: "−∞"}.get(value, "not a number")
    )


def counted(count: int, one: str, many: str | None = None) -> str:
    """Format a count with its word: 1 seed, 3 seeds."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def listed(words: Iterable[object]) -> str:
    """Join items as in a sentence: ``[0, 1, 2]`` gives ``"0, 1 and 2"``."""
    *first, last = [str(word) for word in words]
    return f"{', '.join(first)} and {last}" if first else last


def duration(seconds: float) -> str:
    """Format seconds: 1 h 10 min, 12 min, 45 s."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.3g}{SPACE}s"
    if minutes < 60:
        return f"{minutes}{SPACE}min"
    return f"{minutes // 60:,}{SPACE}h {minutes % 60}{SPACE}min"
