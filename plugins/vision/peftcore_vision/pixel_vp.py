"""Visual prompting in pixels.   Bahng et al. 2022, arXiv 2203.17274 (code: hjbahng/visual_prompting).

Equation:
    x' = x + v,   v [c, height, width]: trained in a frame, or in a square, and zero elsewhere

on pictures x [batch, c, height, width] in the form in which the model reads them: after the normalisation of pixels.
The frame is `size` pixels wide: rows above and below [c, size, width], and columns left and right [c, height - 2 size,
size]. The square [c, size, size] covers the first rows and columns, or ("random") a new random position in each
forward, the same for all pictures of a batch.

It acts in front of the convolution that reads the pixels, and in a UNet or DiT in front of the layer that reads the
latents. All pictures must have one size: `picture`, or by default the size of the model's table of positions, or 224
without such a table. The authors train with SGD and a large learning rate, of the order of pixel values, and use CLIP's
texts as classes, or any outputs of a frozen head.

Parameters: 2 c size (height + width - 2 size), 69,840 for 30 of 224 pixels; a square c size^2.

Start: N(0, 1), as in the code. A fresh adapter is not an identity (``std=0`` makes it one).

Differs from the authors' code: The authors draw the position of a random square in evaluation too, and never at the
last row and column.

Use it: `peftcore.apply(model, "pixel_vp")`, where the inside of a model cannot be changed, or one prompt has to work
for several models, most of all for CLIP; not where tokens can be added: `vpt_shallow` and `vpt_deep` are better with as
few parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from peftcore.author import InputOperator, LearningRate, Method, MethodConfig, Mine, Site, Surgeon, Tags
from peftcore.errors import UnsupportedSite
from peftcore_vision._patches import picture_sites, side_of

Pixels = Annotated[int, Field(ge=1, le=65536)]


class PixelVPConfig(MethodConfig):
    """Options of visual prompting."""

    method: Literal["pixel_vp"] = "pixel_vp"
    shape: Literal["frame", "square", "random"] = "frame"
    """The trained pixels: a frame around the picture, a square in its corner, or a square at random positions."""
    size: Pixels | None = None
    """Width of the frame or the square in pixels; None: 30 for pictures of 224 pixels, and proportionally more or less
    for other sizes."""
    picture: tuple[Pixels, Pixels] | None = None
    """Height and width of pictures; None: the size of the model's table of positions, or 224 by 224 without such a
    table."""
    std: Annotated[float, Field(ge=0.0)] = 1.0
    """Standard deviation of the pixels at the start; 0: an exact identity."""


@dataclass(frozen=True, eq=False)
class PixelSite(Site):
    """A convolution that reads pictures, with the shape of its inputs."""

    high: int = 0
    wide: int = 0

    def size(self, config: PixelVPConfig) -> int:
        """Return the width of the frame or the square in pixels."""
        return config.size or max(1, round(min(self.high, self.wide) * 30 / 224))


class PixelOperator(InputOperator):
    """Adds trained pixels to the pictures."""

    def __init__(self, site: PixelSite, config: PixelVPConfig) -> None:
        super().__init__(site)
        p, c = site.size(config), site.in_features
        self.picture, self.size, self.moves = torch.Size([c, site.high, site.wide]), p, config.shape == "random"
        room = 2 * p <= min(site.high, site.wide) if config.shape == "frame" else p < min(site.high, site.wide)
        if not room:
            raise UnsupportedSite(
                f"{site.path}: pictures of {site.high} by {site.wide} are too small for a {config.shape} of {p}: set "
                "size= or picture="
            )

        def pixels(high: int, wide: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(c, high, wide) * config.std)

        self.square = None if config.shape == "frame" else pixels(p, p)
        if config.shape == "frame":
            self.up, self.down = pixels(p, site.wide), pixels(p, site.wide)
            self.left, self.right = pixels(site.high - 2 * p, p), pixels(site.high - 2 * p, p)

    def prompt(self) -> Tensor:
        """Return v [c, height, width]."""
        c, high, wide = self.picture
        if self.square is None:
            inside = self.left.new_zeros(c, high - 2 * self.size, wide - 2 * self.size)
            return torch.cat([self.up, torch.cat([self.left, inside, self.right], -1), self.down], -2)
        top, left = (int(torch.randint(n - self.size, ())) for n in (high, wide)) if self.moves else (0, 0)
        margins = (left, wide - self.size - left, top, high - self.size - top)
        return nn.functional.pad(self.square, margins)

    def arguments(self, given: dict[str, Any], mine: Mine) -> dict[str, Any]:
        """Return the arguments with the prompt added to the picture; raises UnsupportedSite if the picture has another
        size."""
        x = given[self._names[0]]  # [batch, c, height, width]
        if x.shape[-3:] != self.picture:
            raise UnsupportedSite(
                f"the prompt is for pictures of size {[*self.picture]}, but the model got {[*x.shape[-3:]]}: resize "
                f"them, or apply with picture=({x.shape[-2]}, {x.shape[-1]})"
            )
        (v,) = self.cast(x, self.prompt())
        rows = mine(x)
        moved = x + v if rows is None else torch.where(rows.view(-1, 1, 1, 1), x + v, x)
        return {**given, self._names[0]: moved}


class PixelVP(Method):
    """Trained pixels that are added to a picture, in a frame around it or in a square."""

    name = "pixel_vp"
    Config = PixelVPConfig
    tags = Tags(category="vision", paper="2203.17274", identity_at_init=False, identity_options={"std": 0.0})
    learning_rate = LearningRate(
        40.0,
        "hjbahng/visual_prompting@679e71f, main_clip.py",
        on="CLIP ViT-B/32, CIFAR-100",
        optimizer="SGD",
        momentum=0.9,
    )
    target = ("patch",)

    def inject(self, model: nn.Module, config: PixelVPConfig, surgeon: Surgeon) -> None:
        for site in picture_sites(surgeon):
            side = side_of(surgeon, site) or 224
            high, wide = config.at(site.path).picture or (side, side)
            surgeon.graft(PixelSite(**vars(site), high=high, wide=wide), PixelOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: PixelVPConfig) -> int:
        assert isinstance(site, PixelSite)
        p, c = site.size(config), site.in_features
        return 2 * c * p * (site.high + site.wide - 2 * p) if config.shape == "frame" else c * p * p
