"""Placeholder until the attention sites stand."""
from __future__ import annotations

from peftcore.targets import Resolver, Site


def locate(site: Site, resolver: Resolver) -> Site:
    """The module that calls the attention interface."""
    raise NotImplementedError
