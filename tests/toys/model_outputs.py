"""What models return, for comparisons."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def floats(output: Any) -> Iterator[Tensor]:
    """Every floating-point tensor in what a model returns."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from floats(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from floats(value)
