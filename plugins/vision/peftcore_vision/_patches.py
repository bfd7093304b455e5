"""The convolutions of a model that embed patches of pictures, and how the patches lie in a sequence of tokens."""

from __future__ import annotations

import math
from dataclasses import replace

from peftcore import Site, Surgeon
from peftcore.errors import UnsupportedSite


def patch_sites(surgeon: Surgeon, site: Site) -> list[Site]:
    """Return the convolutions that embed the patches of the tower in which a site is, with the form "patch"."""
    host = surgeon.resolver.host
    tower = next((entry.tower for entry in host.at(site.module_path)), "")
    patches = (e for e in host.entries if e.role == "patch" and e.tower == tower and e.called and len(e.shape) == 4)
    return [replace(surgeon.resolver.site(entry.module, "weight"), form="patch") for entry in patches]


def layout(
    lie: tuple[int, int, int] | None,
    batch: int,
    tokens: int,
    grid: tuple[int, int] | None,
    prefix_tokens: int | None,
) -> tuple[int, int]:
    """Return rows and columns of the patches in a sequence.

    Args:
        lie: images, rows and columns of what the convolution in front embedded, where it ran.
        batch: sequences.
        tokens: tokens of each.
        grid: the proportion of rows to columns, where the user says it.
        prefix_tokens: how many tokens are no patches; None: those that the largest grid leaves over.

    Raises:
        UnsupportedSite: the tokens behind those in front are no grid.
    """
    images, high, wide = lie or (batch, 1, 1)
    if grid is not None:
        high, wide = grid
    elif images != batch:  # windows of them
        high, wide = 1, 1
    if prefix_tokens is None:
        rows = math.isqrt(tokens * high // wide)
        return rows, rows * wide // high
    patches = tokens - prefix_tokens
    rows = round(math.sqrt(max(patches, 0) * high / wide))
    if not rows or patches % rows:
        raise UnsupportedSite(
            f"convpass: {tokens} tokens, {prefix_tokens} of them in front, leave no grid of {high} to {wide}; set "
            "grid= and prefix_tokens= (overrides= for single sites)"
        )
    return rows, patches // rows
