"""Models with a tower of texts and one of images: their blocks, and the norm before those of images."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from peftcore.author import Site, Surgeon, Tap
from peftcore.errors import UnsupportedSite
from peftcore_vision._places import text_sites
from peftcore_vision._prompts import image_blocks


@dataclass(frozen=True)
class Towers:
    """The sites of the tower of texts and of that of images."""

    table: Site
    """The module that embeds texts."""
    tower: Site
    """The tower of texts, of which the mask is seen."""
    texts: list[Site]
    """The blocks of the tower of texts."""
    images: list[Site]
    """The blocks that patches of an image go through."""
    image_width: int
    """Features of the images' stream."""
    norms: list[Site]
    """The norm through which patches go before the first block, if there is one."""


@dataclass(frozen=True, eq=False)
class CoupledSite(Site):
    """A place in the tower of texts, with the width of that of images."""

    width: int = 0
    """Features of a text's stream."""
    image_width: int = 0
    """Features of an image's stream."""

    @property
    def weight_shape(self) -> torch.Size:
        """The widths, which plans and files record as the shape."""
        return torch.Size([self.image_width, self.width])


@dataclass(frozen=True)
class Rest:
    """The arguments that operators of all blocks have in common."""

    names: tuple[str, ...]
    """The arguments of the tower of texts."""
    last: int
    """The number of the last block of images."""
    has_norm: bool
    """Whether there is a norm before the blocks of images."""
    places: Tap
    """The tap from the table of texts to their blocks."""


def two_towers(surgeon: Surgeon) -> Towers:
    """Return both towers.

    Raises:
        UnsupportedSite: the model lacks one of the towers, or a tower does not accept prompts.
    """
    (table, tower), *others = text_sites(surgeon)
    if others:
        raise UnsupportedSite(f"{others[0][0].path} is a second table of texts; target one of them")
    host, images = surgeon.resolver.host, image_blocks(surgeon)
    top = f"{tower.module_path}.".lstrip(".")
    of_texts = [each.path for each in host.entries if each.role == "block" and each.path.startswith(top)]
    if any(image.module_path in of_texts for image in images):
        raise UnsupportedSite(
            f"{tower.module_path or 'the host'} takes texts and images alike: there are no two towers"
        )
    in_front = host.at(images[0].module_path)[0].tower
    norms = [each.path for each in host.entries if each.role == "norm.embed" and each.tower == in_front]
    at = surgeon.resolver.module_site
    return Towers(table, tower, [*map(at, of_texts)], [*images], images[0].width, [*map(at, norms)])
