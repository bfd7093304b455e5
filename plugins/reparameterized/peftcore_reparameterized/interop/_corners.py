"""Reading of shared matrices in a file. They may be larger than needed, because other sites use them too."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from peftcore.author.formats import Found


def corner(found: Found, name: str, shape: Sequence[int]) -> Tensor:
    """Return the first entries of a stored tensor in each dimension, up to `shape`. A tensor that is too small is
    reported as one of a wrong shape."""
    held = tuple(found.shape(name)) if found.has(name) else ()
    enough = len(held) == len(shape) and all(has >= needs for has, needs in zip(held, shape, strict=True))
    return found.take(name, held if enough else shape)[tuple(slice(size) for size in shape)]
