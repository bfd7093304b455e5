"""Whole feed-forward networks as sites, for methods that wrap a feed-forward network or run it several times."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from peftcore.contract.surgeon_protocol import Surgeon
from peftcore.errors import UnsupportedSite
from peftcore.targets.sites import Site

FIRST = ("mlp.gate", "mlp.up", "mlp.gate_up")
"""Roles of the first matrices of a feed-forward network."""


@dataclass(frozen=True, eq=False)
class FeedForwardSite(Site):
    """A site that is a whole feed-forward network."""

    width: int = 0
    """The number of features of the feed-forward network's input."""

    @property
    def weight_shape(self) -> torch.Size:
        """The width as a shape with one dimension. Plans and files show it as the shape of the site."""
        return torch.Size([self.width])


def feed_forward_around(surgeon: Surgeon, site: Site) -> FeedForwardSite | None:
    """Returns the feed-forward network to which a matrix belongs; None if the matrix does not belong to one, as in
    attention.

    Raises:
        UnsupportedSite: the feed-forward network is not a separate module, or the width of its input is unknown.
    """
    host = surgeon.resolver.host
    if not any(entry.role.startswith("mlp.") for entry in host.at(site.module_path)):
        return None
    around = [e.path for e in host.entries if e.role == "mlp" and site.module_path.startswith(f"{e.path}.")]
    if not around:
        raise UnsupportedSite(f"{site.path} belongs to a feed-forward that is not a separate module; exclude it")
    path = max(around, key=len)
    inside = [entry for entry in host.entries if entry.module.startswith(f"{path}.") and entry.role in FIRST]
    if not inside:
        raise UnsupportedSite(f"{path}: found no matrix that reads the input of this feed-forward; exclude it")
    width = surgeon.resolver.site(inside[0].module, inside[0].tensor or "weight", inside[0].role).in_features
    whole = replace(surgeon.resolver.module_site(path), form="activation", meta=site.meta)
    return FeedForwardSite(**vars(whole), width=width)
