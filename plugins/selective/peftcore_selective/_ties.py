"""Tied tensors: token tables that are also heads."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from peftcore.author import Site, Slices, Surgeon


def one_each(sites: Iterable[Site]) -> list[Site]:
    """Return one site for each tensor: among tied sites, the deepest one. A table in an outer module is passed to the
    modules that use it, and may never be called itself."""
    found: dict[tuple[int | str, Slices | None], Site] = {}
    for site in sites:
        tensor = site.layer.held(site.module, site.tensor)
        key = (site.path if tensor is None else id(tensor), site.slices)
        if key not in found or site.module_path.count(".") > found[key].module_path.count("."):
            found[key] = site
    return list(found.values())


def tied_to(site: Site, surgeon: Surgeon) -> list[Site]:
    """Return the other modules that hold the site's tensor; empty if the site is a slice of it."""
    resolver, tensor = surgeon.resolver, site.layer.held(site.module, site.tensor)
    places = resolver.holders(tensor) if isinstance(tensor, nn.Parameter) and site.slices is None else []
    here = site.module_path, site.tensor
    return [each for each in (resolver.site(*place) for place in places) if (each.module_path, each.tensor) != here]
