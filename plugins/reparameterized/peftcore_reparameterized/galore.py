"""GaLore: gradients projected to low rank before the optimizer.   Zhao et al. 2024, arXiv 2403.03507.

Equation:
    G = U S V',   every `gap` steps   P = V[:, :rank]'  (out >= in)   or   P = U[:, :rank]  (out < in)
    g = G P'  or  P' G,     W <- W + scale * (step(g) P)   or   W + scale * (P step(g))

All of W trains, but the state of the optimizer is small: 2 rank max(in, out) numbers for Adam instead of 2 in out.
`step` is the update that any torch optimizer computes for g, so the method works only with an optimizer of
``injection.optimizer(...)``. When P changes, the optimizer's moments are not reset, as in the authors' code. If a batch
has fewer tokens than `rank`, G has fewer directions; the missing ones are drawn, the same ones each time. Weight decay
is decoupled and applied last. Training changes copies of the weights. The base is unchanged until a merge writes them
into it.

Parameters: in * out a site, times the number of experts, each with a separate P.

Start: W at the values of the model: the identity.

Differs from the authors' code: If G has fewer directions than `rank`, rounding errors determine the others in the
authors' code. Here they are drawn.

Use it: `peftcore.apply(model, "galore")`, where you want full fine-tuning, but the state of the optimizer does not fit
into memory.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import AppliedMethod, GradientRule, LearningRate, Method, MethodConfig, Site, Surgeon, Tags
from peftcore.errors import UnsupportedSite

NONE = 10
"""Singular values count as zero up to this multiple of the largest one's rounding error."""

Side = Literal["std", "reverse_std", "right", "left", "full"]


class GaLoreConfig(MethodConfig):
    """Options of GaLore."""

    method: Literal["galore"] = "galore"
    rank: PositiveInt = 128
    """Rank of the projected gradients; at most that of the weight."""
    gap: PositiveInt = 200
    """Number of steps between two computations of P."""
    scale: PositiveFloat = 0.25
    """Factor of every update."""
    side: Side = "std"
    """The side of the gradient that is projected: "std" the shorter one, "reverse_std" the longer one, "right" the
    inputs, "left" the outputs, or both ("full")."""


def factors(gradient: Tensor, rank: int, side: Side) -> dict[str, Tensor]:
    """Return the leading singular vectors on the projected sides, "left" [*experts, out, rank] and "right" [*experts,
    rank, in], of a gradient [*experts, out, in]."""
    tall = gradient.shape[-2] >= gradient.shape[-1]
    sides = {
        "std": ("right",) if tall else ("left",),
        "reverse_std": ("left",) if tall else ("right",),
        "right": ("right",),
        "left": ("left",),
        "full": ("left", "right"),
    }[side]
    U, S, V = torch.linalg.svd(gradient.to(torch.promote_types(gradient.dtype, torch.float32)), full_matrices=False)
    known = S[..., :rank] > NONE * torch.finfo(S.dtype).eps * S[..., :1]
    both = {"left": U[..., :rank].mT, "right": V[..., :rank, :]}
    found = {name: completed(both[name], known).to(gradient.dtype, copy=True) for name in sides}
    return {name: each.mT if name == "left" else each for name, each in found.items()}


def completed(rows: Tensor, known: Tensor) -> Tensor:
    """Return orthonormal rows [*experts, rank, n]. Rows for which `known` [*experts, rank] is False are replaced by
    random ones."""
    if known.all():
        return rows
    drawn = torch.randn(rows.shape[-2:], dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(rows)
    own = rows * known.unsqueeze(-1)
    for _ in range(2):  # rounding leaves something the first time
        drawn = drawn - drawn @ own.mT @ own
    Q, R = torch.linalg.qr(torch.where(known.unsqueeze(-1), rows, drawn).mT)
    signed = Q * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return torch.where(known.unsqueeze(-1), rows, signed.mT)


class Projection(GradientRule):
    """Projects gradients onto their leading directions, and optimizer steps back to the full space."""

    def __init__(self, configs: dict[nn.Parameter, GaLoreConfig]) -> None:
        super().__init__()
        self.configs = configs

    def project(self, grad: Tensor, param: nn.Parameter) -> Tensor:
        config = self.configs.get(param)
        if config is None:  # heads and norms that the user trains along
            return grad
        state = self.state[param]
        steps = state.get("steps", 0)
        if steps % config.gap == 0:
            state.update(factors(grad, config.rank, config.side))
        state["steps"] = steps + 1
        low = state["left"].mT @ grad if "left" in state else grad
        return low @ state["right"].mT if "right" in state else low

    def restore(self, update: Tensor, param: nn.Parameter) -> Tensor:
        state = self.state[param]
        whole = state["left"] @ update if "left" in state else update
        whole = whole @ state["right"] if "right" in state else whole
        return whole * self.configs[param].scale


class GaLore(Method):
    """Gradient low-rank projection."""

    name = "galore"
    Config = GaLoreConfig
    tags = Tags(category="reparameterized", paper="2403.03507", mergeable=True)
    learning_rate = LearningRate(
        1e-2, "jiaweizzhao/GaLore@2cc66f8, scripts/benchmark_c4/llama_60m.sh", on="LLaMA-60M, C4"
    )
    target = "all-linear"

    def inject(self, model: nn.Module, config: GaLoreConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            if len(site.weight_shape) != 2 + len(site.batch):
                raise UnsupportedSite(
                    f"{site.path} has {len(site.weight_shape)} dimensions, and GaLore projects only matrices; exclude "
                    "it"
                )
            surgeon.replace(site)

    def gradient_rule(self, injection: AppliedMethod) -> GradientRule:
        return Projection(_configs(injection))

    def parameter_groups(self, injection: AppliedMethod, *, lr: float, **defaults: Any) -> list[dict[str, Any]]:
        return [{"params": [value for value in _configs(injection) if value.requires_grad], "lr": lr, **defaults}]

    @staticmethod
    def parameter_count(site: Site, config: GaLoreConfig) -> int:
        return site.numel


def _configs(injection: AppliedMethod) -> dict[nn.Parameter, GaLoreConfig]:
    """Map the projected weights to their options."""
    grafts = [graft for graft in injection.grafts if graft.by_method]
    return {graft.operator.get_parameter("value"): injection.config.at(graft.site.path) for graft in grafts}
