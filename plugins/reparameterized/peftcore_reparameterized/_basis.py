"""Random values drawn from a separate seed, so that files can omit them: a pair of frozen matrices that all sites read,
and positions in a weight."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.author import Operator, Site, Surgeon

Draw = Callable[[torch.Generator, Sequence[int]], Tensor]
"""A function that draws a random matrix of a shape."""


class Basis(nn.Module):
    """A pair of frozen matrices A and B, of which each site uses the top-left corner of its own size.

    No file holds them unless they are to be `stored`: loading an adapter draws them again, on the CPU, where a seed
    gives the same numbers on every machine. So the seed is an option of the method and not that of `apply`, which files
    do not hold.
    """

    A: Tensor
    B: Tensor

    def __init__(
        self,
        seed: int,
        draw: Draw,
        A: Sequence[int],
        B: Sequence[int],
        stored: bool = False,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("A", draw(generator, A), persistent=stored)
        self.register_buffer("B", draw(generator, B), persistent=stored)


def graft_between(
    surgeon: Surgeon, config: Any, operator: Callable[..., Operator], draw: Draw, rows_of_A: int = 1
) -> None:
    """Graft ``operator(site, config, basis)`` at all sites, with one shared pair of matrices as large as the largest
    site needs; sites with a different rank or seed share another pair. A has `rows_of_A` rows for each rank."""
    sites = surgeon.sites()
    rows, width = largest((site.out_features, columns(site)) for site in sites)
    for site in sites:
        own = config.at(site.path)
        shapes = (rows_of_A * own.rank, width), (rows, own.rank)
        make = functools.partial(Basis, own.projection_seed, draw, *shapes, own.store_basis)
        basis = surgeon.own(own_name(f"basis_{own.projection_seed}_{own.rank}", own.store_basis), make)
        surgeon.graft(site, operator, config, basis=basis)


def own_name(name: str, stored: bool) -> str:
    """Return the name of shared matrices, which differs between matrices that are saved in files and others."""
    return f"{name}_stored" if stored else name


def columns(site: Site) -> int:
    """Count the columns of the weight as a matrix ``[out, in * kernel]``."""
    return site.in_features * math.prod(site.kernel)


def largest(shapes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Return the smallest shape that contains all of `shapes`: the maximum of each dimension."""
    first, second = zip(*shapes, strict=True)
    return max(first), max(second)


@functools.lru_cache(maxsize=16)
def drawn_entries(size: int, number: int, seed: int) -> Tensor:
    """Return the first of all entries in random order: drawn once for all sites of a shape, also while planning."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randperm(size, generator=generator, device="cpu")[:number].clone()  # all the others are let go
