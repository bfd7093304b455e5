"""How blocks end: by a norm, or by the sum of stream and branches."""

from __future__ import annotations

from dataclasses import replace

from peftcore.author import BlockSite, Site, Surgeon
from peftcore.errors import UnsupportedSite

ENDING = "ending"
"""The form of the site of a norm that ends a block."""


def ending_norms(surgeon: Surgeon, block: BlockSite) -> tuple[Site, ...]:
    """Return the norm that is given the sum at the end of a block, or none where none is.

    Raises:
        UnsupportedSite: the block's code cannot be traced.
    """
    resolver = surgeon.resolver
    inside = [entry for entry in resolver.host.entries if entry.block == block.module_path]
    inside.sort(key=lambda entry: entry.role.startswith("mlp"))  # the feed-forward comes last
    ends = [end for entry in inside if (end := resolver.end_of(entry.module)) is not None]
    if not ends or ends[-1].rest == "unknown":
        raise UnsupportedSite(f"{block.path}: its code does not say whether a norm ends it; exclude= this block")
    norm = ends[-1].entered
    return () if norm is None else (replace(resolver.site(norm, "weight", "norm"), form=ENDING),)
