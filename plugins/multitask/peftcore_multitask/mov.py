"""MoV: a mixture of (IA)^3 vectors.   Zadouri et al. 2023, arXiv 2309.05444 (for-ai/parameter-efficient-moe).

Equation:
    a' = a * sum_e p_e l_e,   p = softmax(W_g a)      (* entry by entry)

a are the activations that (IA)^3 scales: the outputs of the projections to keys and values, and the inputs of the
feed-forward's second matrix. The router reads a itself, separately for each token. Keys and values are also read
separately for each head: W_g [experts, head] is the same for all heads, and l is [heads, experts, head]. All experts
act on each token. The softmax is taken in float32 at least. W_g is without bias.

The width of heads is detected in attentions of transformers; for other attentions set the option `head`. The scale
depends on the token, so the method cannot be merged. Tensors that the model reads without calling their module (stacked
experts, torch's own attention) are refused.

Parameters: experts * (in + in) for the second matrix, experts * (out + head) for keys and for values.

Start: All l at one, W_g from N(0, 0.02). A fresh adapter is the identity, up to rounding.

Differs from the authors' code: No difference is known.

Use it: `peftcore.apply(model, "mov")`, for instructions and tasks of many kinds, with few parameters. Soft routing
needs neither a task label nor a balancing loss.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from peftcore.author import MATRICES, LearningRate, Method, MethodConfig, Router, Site, Surgeon, Tags, full_precision
from peftcore.errors import UnsupportedSite

HEADED = ("attn.k", "attn.v", "cross.k", "cross.v")
"""Roles of matrices whose output consists of the attention heads, one after the other."""


class MoVConfig(MethodConfig):
    """Options of the mixture."""

    method: Literal["mov"] = "mov"
    experts: PositiveInt = 30
    """Number of vectors of each site."""
    scale_inputs: list[str] = Field(default_factory=lambda: ["mlp.down"])
    """Sites whose input is scaled instead of their output: roles, or globs for site paths."""
    head: PositiveInt | None = None
    """Width of a head of keys and values. None: the width is detected in the host's attention."""


@dataclass(frozen=True, eq=False)
class RoutedSite(Site):
    """A site with a scaled activation, which consists of heads of known width."""

    inputs: bool = False
    """True if the site's input is scaled, False if its output is."""
    width: int = 0
    """Features of the activation that is scaled."""
    head: int = 0
    """Features that the router reads at once."""


class MoVOperator(Router):
    """The vectors of one site, and their router."""

    stackable = True

    def __init__(self, site: RoutedSite, config: MoVConfig) -> None:
        super().__init__(site)
        if site.inputs and self.layer.one_hot:
            raise UnsupportedSite(f"{site.path} has no input to scale; remove it from scale_inputs")
        if site.width % site.head:
            raise UnsupportedSite(
                f"{site.path} has {site.width} output features, which do not divide into heads of {site.head}"
            )
        self.inputs = self.changes_inputs = site.inputs
        self.gain = nn.Parameter(torch.ones(site.width // site.head, config.experts, site.head))
        self.router = nn.Parameter(torch.randn(config.experts, site.head) * 0.02)

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        return call(self.mixed(x)) if self.inputs else self.mixed(call(x))

    def mixed(self, a: Tensor) -> Tensor:
        """Return the activation with its channels scaled by the mixture of vectors that the router computes from it."""
        with full_precision(a):
            precise = torch.promote_types(self.gain.dtype, torch.float32)
            heads = self.layer.channels_last(a).unflatten(-1, (len(self.gain), -1)).to(precise)  # [..., heads, head]
            shares = (heads @ self.router.to(precise).T).softmax(-1)  # [..., heads, experts]
            self.noted(shares, inner=1)
            gain = torch.einsum("...he,hew->...hw", shares, self.gain.to(precise)).flatten(-2)
        return a * self.layer.channels_back(gain).to(a.dtype)


def _routed(surgeon: Surgeon, site: Site, config: MoVConfig) -> RoutedSite:
    """Return the site with the width that its router reads at once.

    Raises:
        UnsupportedSite: the width of the heads of keys and values is unknown.
    """
    config = config.at(site.path)
    inputs = any(site.role == each or fnmatch.fnmatchcase(site.path, each) for each in config.scale_inputs)
    width = site.in_features if inputs else site.out_features
    head = width
    if not inputs and site.role in HEADED and site.form == "activation":
        head = config.head or _head(surgeon, site)
    return RoutedSite(**vars(site), inputs=inputs, width=width, head=head)


def _head(surgeon: Surgeon, site: Site) -> int:
    try:
        above = surgeon.resolver.module_site(site.module_path.rpartition(".")[0])
        sizes = surgeon.attention_site(above).geometry
    except UnsupportedSite as error:
        raise UnsupportedSite(f"{site.path}: the width of its heads is unknown ({error}); set head=") from None
    return sizes.value_dim if site.role in ("attn.v", "cross.v") else sizes.head_dim


class MoV(Method):
    """Mixtures of gains for keys, values and inner activations of the feed-forward."""

    name = "mov"
    Config = MoVConfig
    tags = Tags(category="multitask", paper="2309.05444", routes="token")
    learning_rate = LearningRate(
        3e-4, "for-ai/parameter-efficient-moe@e2683fe, configs/mov.gin", on="T5 1.1 large, P3", optimizer="Adafactor"
    )
    target = ("attn.k", "attn.v", "cross.k", "cross.v", "mlp.down")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: MoVConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(_routed(surgeon, site, config), MoVOperator, config)

    @staticmethod
    def parameter_count(site: RoutedSite, config: MoVConfig) -> int:
        return config.experts * (site.width + site.head)
