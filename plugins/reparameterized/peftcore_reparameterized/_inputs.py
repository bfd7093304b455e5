"""A check of target modules, for methods that collect the inputs of linear layers before training."""

from __future__ import annotations

from collections.abc import Sequence

from peftcore.author import Site, sees_vectors
from peftcore.errors import UnsupportedSite


def check_seen(sites: Sequence[Site], instead: str) -> None:
    """Check that at least one site is a linear layer that is called, so that its inputs can be collected.

    Raises:
        UnsupportedSite: no site is a linear layer that is called.
    """
    if sites and not any(map(sees_vectors, sites)):
        raise UnsupportedSite(
            f"{sites[0].path} is not a linear layer that is called, nor is another target module, so there are no "
            f"inputs to look at; set other targets, or {instead}"
        )
