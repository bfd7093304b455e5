"""Shared matrices in a file, which may be larger than needed here where other sites use them too."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from peftcore.author.formats import Found


def corner(found: Found, name: str, shape: Sequence[int]) -> Tensor:
    """Take the values of a tensor up to `shape`; one that is too small is noted as misshaped."""
    held = tuple(found.shape(name)) if found.has(name) else ()
    enough = len(held) == len(shape) and all(has >= needs for has, needs in zip(held, shape, strict=True))
    return found.take(name, held if enough else shape)[tuple(slice(size) for size in shape)]
