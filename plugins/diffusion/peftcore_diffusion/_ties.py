"""Sites of one tensor that several modules share, such as an embedding that is also the head."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from torch import nn

from peftcore.author import Layer, Site, Surgeon


def alike(sites: Iterable[Site]) -> list[list[Site]]:
    """Return the sites in groups: all sites of a group share one tensor."""
    groups: dict[object, list[Site]] = {}
    for site in sites:
        tensor = site.layer.held(site.module, site.tensor)
        tied = isinstance(tensor, nn.Parameter) and site.slices is None
        groups.setdefault(id(tensor) if tied else site.path, []).append(site)
    return list(groups.values())


def holders(surgeon: Surgeon, site: Site) -> list[Site]:
    """Return all sites that share the site's tensor, including sites that are not targets."""
    tensor = site.layer.held(site.module, site.tensor)
    found = surgeon.resolver.holders(tensor) if isinstance(tensor, nn.Parameter) else []
    return [dataclasses.replace(surgeon.resolver.site(*each), meta=site.meta) for each in found] or [site]


def foremost(sites: list[Site]) -> Site:
    """Return the last site of the group whose module is called in a forward, or else the first site. Some modules only
    store a shared tensor, such as T5's `shared`."""
    return [site for site in sites if site.layer.called or site is sites[0]][-1]


def stored_as(site: Site, layer: Layer) -> Site:
    """Return a copy of the site whose tensor is treated as the weight of another kind of layer."""
    return dataclasses.replace(site, form="weight", layer=layer)
