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

    Files contain the matrices only if `stored` is True. Otherwise loading an adapter draws them again on the CPU, where
    a seed gives the same numbers on every machine. The seed is an option of the method, because files contain options
    but not the seed of `apply`.
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
    """Install ``operator(site, config, basis)`` at all sites. The sites share one pair of matrices, which is large
    enough for the largest site. Sites with a different rank or seed share another pair. A has ``rows_of_A * rank``
    rows."""
    sites = surgeon.sites()
    rows, width = largest((site.out_features, columns(site)) for site in sites)
    for site in sites:
        own = config.at(site.path)
        shapes = (rows_of_A * own.rank, width), (rows, own.rank)
        make = functools.partial(Basis, own.projection_seed, draw, *shapes, own.store_basis)
        basis = surgeon.own(own_name(f"basis_{own.projection_seed}_{own.rank}", own.store_basis), make)
        surgeon.graft(site, operator, config, basis=basis)


def own_name(name: str, stored: bool) -> str:
    """Return the name of shared matrices. Matrices that are saved in files get a separate name."""
    return f"{name}_stored" if stored else name


def columns(site: Site) -> int:
    """Return the number of columns of the weight as a matrix ``[out, in * kernel]``."""
    return site.in_features * math.prod(site.kernel)


def largest(shapes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Return the smallest shape that contains all of `shapes`: the maximum of each dimension."""
    first, second = zip(*shapes, strict=True)
    return max(first), max(second)


@functools.lru_cache(maxsize=16)
def drawn_entries(size: int, number: int, seed: int) -> Tensor:
    """Return `number` different indices below `size`, in random order. Results are cached, so sites of the same shape
    share them. They are drawn on the CPU, also while planning."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randperm(size, generator=generator, device="cpu")[:number].clone()  # all the others are let go
