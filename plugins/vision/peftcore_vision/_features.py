"""Finds the sites at image features: a projection that returns the features, or a classifier that reads them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch

from peftcore.author import MethodConfig, Site, Surgeon
from peftcore.errors import TargetError, UnsupportedSite

IMAGES = frozenset({"visual", "vision", "image", "images", "img"})
"""Words that identify the image projection by its name, in models that also have a text projection."""


class FeatureConfig(MethodConfig):
    """Options of methods that act on image features."""

    features: Literal["output", "input"] = "output"
    """Whether the features are the site's output (a projection) or its input (a classifier)."""


@dataclass(frozen=True, eq=False)
class FeatureSite(Site):
    """A module that returns image features, or reads them."""

    width: int = 0
    """Number of features."""

    @property
    def weight_shape(self) -> torch.Size:
        """The shape [width], which plans and saved files record for this target."""
        return torch.Size([self.width])


def feature_sites(surgeon: Surgeon, config: FeatureConfig) -> list[FeatureSite]:
    """Return the sites of the user's targets. Without targets, return the image projection if `features` is "output",
    and the classifiers if it is "input".

    Raises:
        TargetError: the model lacks a projection of images.
        UnsupportedSite: the number of features of a target is unknown.
    """
    sites = surgeon.sites()
    if surgeon.wishes.target is None and config.features == "output":
        sites = [site for site in sites if _words(site.module_path) & IMAGES]
        if not sites:
            raise TargetError(
                f"this {type(surgeon.model).__name__} has no projection of images; set target= to the module that "
                'returns their features, or features="input" to adapt the input of a classifier'
            )
    return [_feature_site(surgeon, site, config.at(site.path)) for site in sites]


def image_projection(surgeon: Surgeon) -> FeatureSite:
    """Return the site of the model's image projection. The user's targets are ignored.

    Raises:
        UnsupportedSite: the model lacks a projection of images, or has several.
    """
    heads = [entry for entry, _ in surgeon.resolver.host.select("head") if _words(entry.path) & IMAGES]
    if len(heads) != 1:
        raise UnsupportedSite(
            f"this {type(surgeon.model).__name__} has {len(heads)} projections of images, not one; name one in target="
        )
    return _feature_site(surgeon, surgeon.resolver.module_site(heads[0].path), FeatureConfig(method="features"))


def _words(path: str) -> set[str]:
    """Return the words in a path: ``visual`` and ``projection`` of ``visual_projection``."""
    return {word.lower() for word in re.findall("[A-Z]?[a-z]+", path)}


def _feature_site(surgeon: Surgeon, site: Site, config: FeatureConfig) -> FeatureSite:
    """Return the site with its number of features. It is that of the site's matrix, or of the last matrix inside the
    site's module (a pooling head)."""
    if site.layer.channel_dim != -1 or site.layer.one_hot:
        raise UnsupportedSite(
            f"{site.path} is not a map of features in the last dimension; name another module in target="
        )
    if site.layer.has(site.module, site.tensor):
        width = site.out_features if config.features == "output" else site.in_features
    else:
        below = [each for each in surgeon.resolver.host.entries if each.path.startswith(f"{site.module_path}.")]
        matrices = [each for each in below if len(each.shape) == 2]
        if not matrices or config.features == "input":
            raise UnsupportedSite(
                f"{site.path or 'the host'}: its numbers of input and output features are unknown; name another module "
                "in target="
            )
        width = matrices[-1].rows
    return FeatureSite(**vars(site), width=width)
