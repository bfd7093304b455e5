"""Polyhistor-Lite: adapters of tasks from templates that kernels scale up to each layer.   Liu et al. 2022, arXiv
2210.03265.

Equation:
    y = h + W_up f(W_down h),   W_down = K kron (U_t V_t) [n, d],   W_up = K' kron (U'_t V'_t) [d, n]
    U_t = A v_t [n0, r],  V_t = B v_t [r, d0],  U'_t = A' v_t [d0, r],  V'_t = B' v_t [r, n0],   t the task

The following ideas are from the paper. Each task has an embedding v_t, from which hypernetworks compute a template in
two factors (Polyhistor). Each layer has a kernel K, the same for all tasks, which scales templates up to the layer's
width; the templates have the width of the narrowest stage of a hierarchical model. Polyhistor-Lite combines both. A
layer of d = m d0 features has n = m n0 inner ones, where n0 = d0 / reduction, rounded down, but at least 1. So kernels
are [m, m], which is one number in a plain ViT. The Kronecker products are not stored as matrices: h is split into m
pieces.

The call passes the task by ``with peftcore.call(model, task=...)``: one task for all rows, or one for each row.

Parameters: k (tasks + 2 r (n0 + d0)) once, and 2 m^2 per adapter.

Start: Embeddings from N(0, 1), A to B' so that templates keep the variance of their inputs, K as the identity matrix
(with equal entries, all m pieces would remain equal), and K' at zero. So a fresh adapter is the identity.

Differs from the authors' code: The authors published no code, and only their abstract, figures and introduction were
available. So all that the equation does not fix is chosen here, after `hyperformer_pp`, on which they build: h is the
output of the last matrix of attention or feed-forward, f is GELU; norms are left out, and neither hypernetworks nor
adapters have biases; down and up projections have separate templates and kernels, and all layers share these templates,
attention and feed-forward alike.

Use it: `peftcore.apply(model, "polyhistor", tasks=["segmentation", "depth", "normals"])`, for several dense tasks on
one hierarchical backbone, a Swin or a SegFormer, where a further task should add only k parameters; not where widths
lack a common divisor (the similar `hyperformer_pp` has a network for each width), nor where the adapter has to be
merged. `compacter` is a similar method for one task.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    ACTIVATIONS,
    OUTPUTS,
    AtBranchEnd,
    BranchSite,
    Joins,
    Method,
    Shared,
    Surgeon,
    Tags,
    branch_end,
)
from peftcore.errors import UnsupportedSite
from peftcore_multitask._tasks import TaskConfig, Tasks, task_count


class PolyhistorConfig(TaskConfig):
    """Options of Polyhistor."""

    overridable = ("activation", "joins")

    method: Literal["polyhistor"] = "polyhistor"
    rank: PositiveInt = 1
    """Rank r of the templates."""
    reduction: PositiveInt = 32
    """Divisor of the templates' width d0; the quotient is their inner width n0."""
    width: PositiveInt | None = None
    """Width d0 of the templates, which must divide the width of each site; by default the width of the narrowest
    site."""
    task_width: PositiveInt = 64
    """Width k of the embeddings of tasks."""
    activation: Literal["gelu_tanh", "gelu", "relu", "silu", "tanh"] = "gelu_tanh"
    """The non-linearity f."""
    joins: Joins = "matrix"
    """Where an adapter reads and adds. "matrix": at the output of a branch's last matrix. "stream": after the host's
    dropout, layer scale and stochastic depth on the branch's output."""


class Templates(nn.Module):
    """The embeddings of tasks, and the linear maps that compute the templates' factors from them."""

    def __init__(self, width: int, config: PolyhistorConfig) -> None:
        super().__init__()
        k, r, inner = config.task_width, config.rank, max(width // config.reduction, 1)
        self.embedding = nn.Parameter(torch.randn(task_count(config), k))
        # The variance of a template's product is that of its input, if that of a factor is one by what it sums over.
        self.down_U = nn.Parameter(torch.randn(inner, r, k) / math.sqrt(k * r))
        self.down_V = nn.Parameter(torch.randn(r, width, k) / math.sqrt(k * width))
        self.up_U = nn.Parameter(torch.randn(width, r, k) / math.sqrt(k * r))
        self.up_V = nn.Parameter(torch.randn(r, inner, k) / math.sqrt(k * inner))

    def factors(self) -> list[Tensor]:
        """Return U [tasks, n0, r], V [tasks, r, d0], U' [tasks, d0, r] and V' [tasks, r, n0]."""
        maps = (self.down_U, self.down_V, self.up_U, self.up_V)
        return [torch.einsum("abk,tk->tab", each, self.embedding) for each in maps]


@dataclass(frozen=True, eq=False)
class ScaledSite(BranchSite):
    """The site of an adapter."""

    times: int = 1
    """The factor m: the site's width divided by the templates' width."""


class PolyhistorOperator(AtBranchEnd):
    """The adapter of one site: its kernels, and the templates that all sites share."""

    def __init__(self, site: ScaledSite, config: PolyhistorConfig, templates: Shared) -> None:
        super().__init__(site)
        self.templates, self.tasks, self.times = templates, Tasks(site, config), site.times
        self.down = nn.Parameter(torch.eye(site.times))
        self.up = nn.Parameter(torch.zeros(site.times, site.times))
        self.activation = ACTIVATIONS[config.activation]()

    def adapt(self, h: Tensor) -> Tensor:
        x = self.layer.channels_last(h)  # [rows, ..., d]
        rows = self.layer.rows(h)
        factors = (self.tasks.of_rows(each, rows) for each in self.templates.module.factors())
        down, up, U, V, up_U, up_V = self.cast(h, self.down, self.up, *factors)
        pieces = x.reshape(rows, -1, x.shape[-1] // self.times)  # [rows, positions * m, d0]
        made = scaled(self.activation(scaled(pieces, down, U, V)), up, up_U, up_V)
        return h + self.layer.channels_back(made.reshape(x.shape))


def scaled(pieces: Tensor, kernel: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """Return features multiplied by the matrix kernel kron (U V). Input and output features are split into m pieces,
    ``[rows, positions * m, ...]``, where m is the size of the kernel."""
    low = (pieces @ V.mT).unflatten(1, (-1, len(kernel)))  # [rows, positions, m, r]
    return torch.einsum("ij,npjr->npir", kernel, low).flatten(1, 2) @ U.mT


class Polyhistor(Method):
    """Adapters of several tasks, from templates that all layers share.

    Example:
        injection = peftcore.apply(model, "polyhistor", tasks=["segmentation", "depth", "normals"])
        peftcore.call(model, task="depth")  # or a list, one for each row; with `with`, for a while
    """

    name = "polyhistor"
    Config = PolyhistorConfig
    tags = Tags(category="multitask", paper="2210.03265")
    target = ("attn.output", "mlp.output")
    alternatives = OUTPUTS

    def inject(self, model: nn.Module, config: PolyhistorConfig, surgeon: Surgeon) -> None:
        sites = surgeon.sites()
        widths = [site.out_features for site in sites]
        width = config.width or min(widths)
        for site in sites:
            if site.out_features % width:
                raise UnsupportedSite(
                    f"{site.path} is {site.out_features} wide, which is not a multiple of width={width} of the "
                    f"templates; set width={math.gcd(*widths)}, which divides all widths, or exclude it"
                )
        templates = surgeon.own("templates", lambda: Templates(width, config))
        for site in sites:
            place = branch_end(surgeon, site, config.at(site.path).joins)
            scaled_site = ScaledSite(**vars(place), times=site.out_features // width)
            surgeon.graft(scaled_site, PolyhistorOperator, config, place.places, templates=templates)

    @staticmethod
    def parameter_count(site: ScaledSite, config: PolyhistorConfig) -> int:
        return 2 * site.times**2
