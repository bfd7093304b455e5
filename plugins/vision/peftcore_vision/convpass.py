"""Convpass, convolutional bypasses.   Jie and Deng 2022, arXiv 2207.07039 (code: JieShibo/PETL-ViT).

Equation:
    out = Branch(x) + s (W_up q(conv_3x3(q(W_down x + b_down))) + b_up),   q(u) = u sigmoid(1.702 u)

in parallel with attention and feed-forward. x is the branch's input (after the norm), W_down [h, d], W_up [d, h]; the
convolution has h channels and a bias, and acts on the patches arranged as in the picture, with zero padding. It treats
each token in front of the patches (class, distillation, registers) as a picture of one pixel, so only the centre of the
kernel acts on it.

Activations of four dimensions (Swin, ConvNeXt) are grids already. In a sequence, the patches are the last tokens: as
many as fit into the largest grid with the proportions of the model's patch embedding. The tokens in front of them are
not patches. The bypass is added to the residual stream after the branch's layer scale and dropout, and a separate draw
of stochastic depth drops it. With joins="matrix" the branch's layer scale, dropout and stochastic depth act on the
bypass too.

Parameters: 2 d h + h + d + 9 h^2 + h per bypass, two per block. It cannot be merged.

Start: W_down from a Xavier-uniform draw, the convolution from the identity (or Xavier), W_up at zero. A fresh adapter
is the identity.

Differs from the authors' code: As in the code, stochastic depth has a separate draw (the paper draws none). In models
with windows each window is convolved as a separate picture; in the authors' variant for Swin the convolution crosses
window borders.

Use it: `peftcore.apply(model, "convpass")`, where few labelled examples are available.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.author import (
    OUTPUTS,
    BranchSite,
    Bypass,
    Joins,
    LearningRate,
    Method,
    MethodConfig,
    Share,
    Surgeon,
    Tags,
    Tap,
    branch,
)
from peftcore.errors import UnsupportedSite
from peftcore_vision._patches import over_patches, patch_sites


class ConvpassConfig(MethodConfig):
    """Options of Convpass."""

    method: Literal["convpass"] = "convpass"
    bottleneck: PositiveInt = 8
    """Channels h of the convolution."""
    scale: PositiveFloat = 1.0
    """The factor s in front of the bypass; the authors search it between 0.01 and 100."""
    conv_init: Literal["identity", "xavier"] = "identity"
    """Start of the convolution: the identity (a one at the centre of each channel), or a Xavier-uniform draw."""
    grid: tuple[PositiveInt, PositiveInt] | None = None
    """Rows and columns of the patches; only their ratio counts. The default is the ratio in the output of the patch
    convolution, or a square if that convolution did not run."""
    prefix_tokens: NonNegativeInt | None = None
    """Number of tokens in front of the patches, such as a class token. By default, all tokens that do not fit into the
    largest grid."""
    joins: Joins = "stream"
    """Where the bypass is added. "stream": to the residual stream, after the host's dropout, layer scale and stochastic
    depth. "matrix": to the output of the branch's last matrix, before these operations."""
    dropout: Share = 0.1
    """Dropout probability of the inputs of W_up, as in the authors' code."""


def _quick_gelu(u: Tensor) -> Tensor:
    return u * torch.sigmoid(1.702 * u)


class ConvpassOperator(Bypass):
    """The bypass of one branch. At the convolution that embeds the patches (form "patch") it records their grid."""

    def __init__(self, site: BranchSite, config: ConvpassConfig, lie: Tap) -> None:
        super().__init__(site)
        site.check_rows_first()
        self.drops_path = site.drops_path
        self.scale, self.grid, self.prefix_tokens, self.lie = config.scale, config.grid, config.prefix_tokens, lie
        channels = config.bottleneck
        self.down = nn.Linear(site.width, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.dropout = nn.Dropout(config.dropout)
        self.up = nn.Linear(channels, site.out_features)
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.xavier_uniform_(self.conv.weight) if config.conv_init == "xavier" else nn.init.dirac_(self.conv.weight)
        for zero in (self.down.bias, self.conv.get_parameter("bias"), self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def at(self, form: str, module: nn.Module) -> Callable[..., Any]:
        return self._at_patches if form == "patch" else super().at(form, module)

    def _at_patches(self, call: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        patches = call(*args, **kwargs)  # [batch, features, rows, columns]
        self.lie.put((patches.shape[0], patches.shape[-2], patches.shape[-1]))
        return patches

    def beside(self, x: Tensor) -> Tensor:
        down, down_bias, up, up_bias = self.cast(x, self.down.weight, self.down.bias, self.up.weight, self.up.bias)
        inner = _quick_gelu(F.linear(x, down, down_bias))  # [batch, ..., h]
        inner = self.dropout(_quick_gelu(self._convolve(inner)))
        return self.scale * F.linear(inner, up, up_bias)

    def dropped(self, added: Tensor, end: Callable[..., Any]) -> Tensor:
        """Drop the bypass by stochastic depth, with a separate draw."""
        return end(added) if self.drops_path else added

    def _convolve(self, u: Tensor) -> Tensor:
        assert self.conv.bias is not None, "it is made with one"
        weight, bias = self.cast(u, self.conv.weight, self.conv.bias)

        def act(pictures: Tensor) -> Tensor:
            return F.conv2d(pictures, weight, bias, padding=1).to(u.dtype)

        return over_patches(u, act, self.lie.get(), self.grid, self.prefix_tokens)


class Convpass(Method):
    """A convolution in parallel with each attention and each feed-forward."""

    name = "convpass"
    Config = ConvpassConfig
    tags = Tags(category="vision", paper="2207.07039", random=True)
    learning_rate = LearningRate(1e-3, "JieShibo/PETL-ViT@026e4f1, convpass/vtab/train.py", on="ViT-B/16, VTAB-1k")
    target = ("attn.output", "mlp.output")
    alternatives = OUTPUTS

    config_version = 2
    former_defaults = ({"joins": "matrix", "dropout": 0.0},)

    def inject(self, model: nn.Module, config: ConvpassConfig, surgeon: Surgeon) -> None:
        lies: dict[str, Tap] = {}
        for site in surgeon.sites():
            own, patches = config.at(site.path), patch_sites(surgeon, site)
            place = branch(surgeon, site, joins=own.joins)
            if not patches and own.grid is None:
                raise UnsupportedSite(
                    f"{site.path}: no convolution in this tower embeds patches of a picture, so its tokens have no "
                    "grid; target a tower of images, or set grid="
                )
            tower = patches[0].path if patches else ""
            seen = () if tower in lies else tuple(patches)
            lie = lies.setdefault(tower, Tap(until_backward=True))
            surgeon.graft(place, ConvpassOperator, config, (*place.places, *seen), lie=lie)

    @staticmethod
    def parameter_count(site: BranchSite, config: ConvpassConfig) -> int:
        h = config.bottleneck
        return (site.width + site.out_features) * h + h + site.out_features + 9 * h * h + h
