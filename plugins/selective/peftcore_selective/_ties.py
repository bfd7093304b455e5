"""Tied tensors, such as a token embedding that is also the weight of the head."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from peftcore.author import Site, Slices, Surgeon


def one_each(sites: Iterable[Site]) -> list[Site]:
    """Return one site for each tensor. Of several sites with the same tensor, the one with the deepest path is
    returned: an embedding in an outer module may only be passed to inner modules, and never be called itself."""
    found: dict[tuple[int | str, Slices | None], Site] = {}
    for site in sites:
        tensor = site.layer.held(site.module, site.tensor)
        key = (site.path if tensor is None else id(tensor), site.slices)
        if key not in found or site.module_path.count(".") > found[key].module_path.count("."):
            found[key] = site
    return list(found.values())


def tied_to(site: Site, surgeon: Surgeon) -> list[Site]:
    """Return the sites of other modules with the same tensor as the given site; empty if the given site is a slice of
    it."""
    resolver, tensor = surgeon.resolver, site.layer.held(site.module, site.tensor)
    places = resolver.holders(tensor) if isinstance(tensor, nn.Parameter) and site.slices is None else []
    here = site.module_path, site.tensor
    return [each for each in (resolver.site(*place) for place in places) if (each.module_path, each.tensor) != here]
