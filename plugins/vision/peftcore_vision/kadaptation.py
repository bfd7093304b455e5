"""KAdaptation, Kronecker adaptation.   He et al. 2022, arXiv 2203.16329 (code: eric-ai-lab/PEViT).

Equation:
    y = W x + bias + s H^T x + b,   H = sum_i (l_i r_i) (x) (u_i v_i),   i = 1 .. n

The first factors l_i r_i [n, n] of the Kronecker products have rank one, and all layers share them: one set for
queries, one for values, and one for each other role. The second factors u_i [in/n, r] and v_i [r, out/n] belong to one
site. H is an update of rank n r. The matrices of one attention share b; s = 160 (128 / 4 · 5 in the code). In training
entries of H are dropped with a probability of 0.5, except for weights that the model reads without calling their
module, where dropout cannot act.

Parameters: r (in + out) per site, out per attention, and 2 n^2 per role: 50,176 in the tower of a CLIP ViT-B/32.

Start: l and r uniform in +-0.01, u from a Glorot-uniform draw, v and b at zero. A fresh adapter is the identity.

Differs from the authors' code: The code starts both u and v at zero, where neither gets a gradient, so only b would
learn. It also uses the u and v of queries for values, adds the update of queries after their division by the square
root of a head's width, and returns the tokens of a batch in another order than it reads them. Here the update is that
of the paper: it acts on the weight, and can be merged.

Use it: `peftcore.apply(model, "kadaptation")`, to get an update of a higher rank with the parameters of a LoRA of rank
1; not where n does not divide the widths (`lokr` chooses sizes that fit). `compacter` has the same products in
bottleneck adapters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.author import MATRICES, Method, MethodConfig, Operator, Share, Shared, Site, Surgeon, Tags, bias_name
from peftcore.errors import UnsupportedSite


class KAdaptationConfig(MethodConfig):
    """Options of KAdaptation."""

    overridable = ("rank", "scale", "dropout")

    method: Literal["kadaptation"] = "kadaptation"
    products: PositiveInt = 32
    """Number n of Kronecker products, which is also the size of their first factors; it must divide the numbers of
    inputs and outputs."""
    rank: PositiveInt = 1
    """Rank r of the second factor of each product."""
    scale: PositiveFloat = 160.0
    """The factor s in front of the update."""
    rule_range: PositiveFloat = 0.01
    """Bound of the uniform draw of l and r."""
    dropout: Share | None = None
    """Dropout probability of the entries of H. None: 0.5, but 0 for weights that the model reads without calling their
    module."""


class Rule(nn.Module):
    """The parameters l and r of the first factors, which all sites of a role share."""

    def __init__(self, config: KAdaptationConfig) -> None:
        super().__init__()
        n, bound = config.products, config.rule_range
        self.left = nn.Parameter(torch.empty(n, n).uniform_(-bound, bound))  # [i, inputs]
        self.right = nn.Parameter(torch.empty(n, n).uniform_(-bound, bound))  # [i, outputs]


class SharedBias(nn.Module):
    """The bias b that the matrices of one attention share."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))


class KAdaptationOperator(Operator):
    """The update of one site."""

    def __init__(self, site: Site, config: KAdaptationConfig, rule: Shared, bias: Shared) -> None:
        super().__init__(site)
        n, rank, columns = config.products, config.rank, site.in_features * math.prod(site.kernel)
        if site.in_features % n or site.out_features % n:
            raise UnsupportedSite(
                f"{site.path} is {site.out_features} x {site.in_features}, which products={n} does not divide; choose "
                "another number, or exclude it"
            )
        if site.layer.one_hot:
            raise UnsupportedSite(f"{site.path} is an embedding table, which cannot have a bias; exclude it")
        if site.form == "weight" and site.missing(bias_name(site.tensor)):
            raise UnsupportedSite(
                f"{site.path} is read as a weight and has no bias to which b could be added; exclude it"
            )
        if config.dropout and site.form == "weight":
            raise UnsupportedSite(
                f"{site.path} is read as a weight, not called, so dropout cannot act on its update; use dropout=0 or "
                "exclude it"
            )
        self.rule, self.bias, self.scale = rule, bias, config.scale
        self.inputs = (site.in_features, *site.kernel)
        self.dropout = config.dropout if config.dropout is not None else 0.5 * (site.form != "weight")
        bound = math.sqrt(2) * math.sqrt(6 / (columns // n + rank))
        self.u = nn.Parameter(torch.empty(*site.batch, n, columns // n, rank).uniform_(-bound, bound))
        self.v = nn.Parameter(torch.zeros(*site.batch, n, rank, site.out_features // n))

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return the factors of H^T, ``[*batch, out, n r]`` and ``[*batch, n r, in, *kernel]``."""
        rule = self.rule.module
        A = torch.einsum("ip,...ikr->...irpk", rule.left, self.u).flatten(-2).flatten(-3, -2)
        B = torch.einsum("iq,...irj->...qjir", rule.right, self.v).flatten(-2).flatten(-3, -2)
        return B, A.unflatten(-1, self.inputs)

    def dense(self) -> Tensor:
        """Return the full matrix H^T of the update, ``[*batch, out, in, *kernel]``."""
        B, A = self.pair()
        return (B @ A.flatten(B.dim() - 1)).unflatten(-1, self.inputs)

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        if self.training and self.dropout:
            update = F.dropout(self.dense(), self.dropout)
            y = y + self.scale * self.layer.apply(x, *self.cast(x, update)).to(y.dtype)
        else:
            B, A = self.cast(y, *self.pair())
            y = self.layer.add(y, self.layer.apply(x, A), B, self.scale)
        return y + self.layer.along_channels(self.bias.module.weight.to(y.dtype), y)

    def merged(self, weight: Tensor) -> Tensor:
        return weight + self.scale * self.dense().view(weight.shape)

    def merged_bias(self, bias: Tensor | None, weight: Callable[[], Tensor]) -> Tensor | None:
        own: Tensor = self.bias.module.weight
        return own if bias is None else bias + own


class KAdaptation(Method):
    """Updates that are sums of Kronecker products with shared first factors."""

    name = "kadaptation"
    Config = KAdaptationConfig
    tags = Tags(category="vision", paper="2203.16329", mergeable=True, random=True)
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: KAdaptationConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            owner = site.module_path.rpartition(".")[0] if site.tensor == "weight" else site.module_path
            shape = (*site.batch, site.out_features)
            kind = site.role or site.path.rpartition(".")[2]
            name = f"bias_{owner.replace('.', '_')}_{'x'.join(map(str, shape))}"
            rule = surgeon.own(f"rule_{kind.replace('.', '_')}", partial(Rule, config))
            bias = surgeon.own(name, partial(SharedBias, *shape))
            surgeon.graft(site, KAdaptationOperator, config, rule=rule, bias=bias)

    @staticmethod
    def parameter_count(site: Site, config: KAdaptationConfig) -> int:
        columns = site.in_features * math.prod(site.kernel)
        return math.prod(site.batch) * config.rank * (columns + site.out_features)
