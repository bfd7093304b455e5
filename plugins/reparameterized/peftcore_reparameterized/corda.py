"""CorDA: context-oriented decomposition.   Yang et al. 2024, arXiv 2406.05223 (iboing/CorDA).

Equation:
    C = mean of X' X / max(X)^2 over the batches,   X [tokens, in] the inputs of a target module
    C' = C + d mean(diag C) I,   W C' = U S V',   B0 = U_r sqrt(S_r / s),   A0 = sqrt(S_r / s) V_r' inv(C')
    W' = W - s B0 A0 + s B A = W + s (B A - B0 A0),   A = A0 and B = B0 at first

CorDA is PiSSA with a decomposition of the outputs that a weight computes for the inputs in ``data=``, which needs no
labels. mode="ipm" (instruction previewed) trains the r largest directions; use data of the task. mode="kpm" (knowledge
preserved) trains the r smallest directions; use data of the knowledge to preserve. d is 0.01, and is doubled until
inv(C') is exact enough.

The base is unchanged, and A0 and B0 are frozen buffers, so the adapter fits the original base. max(X) is the largest
entry with its sign, as in the authors' code and in peft. s is 1 at every rank, as in the authors' code, or alpha / rank
where `alpha` is given. Padding is excluded. Weights whose inputs are not vectors (convolutions, embeddings, tensors
that are read) are decomposed directly, with C' = I. The matrices C [in, in] of all modules are in memory at the same
time.

Parameters: rank * (in * kernel + out) a site, times the number of experts; rank at most that of the weight.

Start: A = A0 and B = B0: the identity.

Differs from the authors' code: The authors' code and peft write W - s B0 A0 into the base; outputs and gradients are
the same. They include padding in C.

Use it: `peftcore.apply(model, "corda", data=batches)`, instead of LoRA where the knowledge of the base must be
preserved (kpm), or training is short (ipm).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    MATRICES,
    AppliedMethod,
    Batches,
    LearningRate,
    Method,
    MethodConfig,
    Share,
    Site,
    Surgeon,
    Tags,
    sees_vectors,
    watched_inputs,
)
from peftcore.errors import CalibrationError
from peftcore_reparameterized._decomposed import PairOperator, as_matrix, as_rows, positive, rank_within
from peftcore_reparameterized._inputs import check_seen
from peftcore_reparameterized._low_rank import low_rank_count

LARGEST_ERROR = 0.05
"""Largest accepted error of inv(C'), which is the distance of C' inv(C') from the identity."""


class CorDAConfig(MethodConfig):
    """Options of CorDA."""

    method: Literal["corda"] = "corda"
    rank: PositiveInt = 128
    """Number of adapted directions; at most all of the weight's."""
    alpha: PositiveFloat | None = None
    """Numerator of the scale ``alpha / rank``; with None the scale is 1."""
    dropout: Share = 0.0
    """Probability with which inputs of the trained factors are dropped in training."""
    mode: Literal["ipm", "kpm"] = "ipm"
    """Whether the largest directions train (ipm) or the smallest (kpm)."""


def damped(C: Tensor) -> tuple[Tensor, Tensor]:
    """Return C' and its inverse.

    Raises:
        CalibrationError: all inputs were zero.
    """
    identity = torch.eye(len(C), dtype=C.dtype, device=C.device)
    mean, damp = C.diagonal().mean(), 0.01
    if not mean > 0:
        raise CalibrationError("all inputs of a target module were zero; pass other data")
    while True:
        fixed = C + damp * mean * identity
        inverse = torch.linalg.inv(fixed)
        if torch.dist(fixed @ inverse, identity) < LARGEST_ERROR:
            return fixed, inverse
        damp *= 2


class CorDAOperator(PairOperator):
    """The trained part of one weight, and its frozen initial value. Both are zero until `decompose` sets them."""

    def __init__(self, site: Site, config: CorDAConfig) -> None:
        rank = rank_within(site, config.rank)
        A = torch.zeros(*site.batch, rank, site.in_features, *site.kernel)
        scale = 1.0 if config.alpha is None else config.alpha / config.rank
        super().__init__(site, A, torch.zeros(*site.batch, site.out_features, rank), scale, config.dropout)
        self.last = config.mode == "kpm"

    @torch.no_grad()
    def decompose(self, site: Site, C: Tensor | None) -> None:
        """Compute A and B from the weight and C. If C is None, they are computed from the weight only."""
        weight = as_matrix(site)  # [*batch, out, in * kernel]
        fixed, inverse = (None, None) if C is None else damped(C.to(weight))
        U, S, V = torch.linalg.svd(weight if fixed is None else weight @ fixed, full_matrices=False)
        rank = self.B.shape[-1]
        part = slice(S.shape[-1] - rank, None) if self.last else slice(rank)
        U, S, V = U[..., part], S[..., part], V[..., part, :]
        sign = positive(U.gather(-2, U.abs().argmax(-2, keepdim=True)))  # [*batch, 1, rank]
        root = (S / self.scale).sqrt()
        A = root.unsqueeze(-1) * sign.mT * (V if inverse is None else V @ inverse)
        self.start(as_rows(site, A), U * sign * root.unsqueeze(-2))


class CorDA(Method):
    """Low-rank adaptation that starts at a decomposition which depends on data."""

    name = "corda"
    Config = CorDAConfig
    tags = Tags(category="reparameterized", paper="2406.05223", mergeable=True, low_rank=True, needs_data=True)
    learning_rate = LearningRate(2e-5, "iboing/CorDA@baffb03, tools/train_CorDA.sh", on="Llama-2-7B, MetaMathQA")
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES
    config_version = 2
    former_defaults = ({"alpha": 128.0},)

    def inject(self, model: nn.Module, config: CorDAConfig, surgeon: Surgeon) -> None:
        sites = surgeon.sites()
        check_seen(sites, "pissa")
        for site in sites:
            surgeon.graft(site, CorDAOperator, config)

    def calibrate(self, model: nn.Module, data: Batches, config: CorDAConfig, injection: AppliedMethod) -> None:
        grafts: list[Any] = [graft for graft in injection.grafts if graft.by_method]
        sums: dict[nn.Module, Tensor] = {}
        calls: dict[nn.Module, int] = {}

        def look(module: nn.Module, given: Tensor, x: Tensor) -> None:
            if not (len(x) and x.isfinite().all() and x.max() != 0):
                raise CalibrationError("inputs of a target module are not finite, or all zero; pass other data")
            x = x / x.max().abs()
            sums[module] = sums.get(module, 0) + x.T @ x
            calls[module] = calls.get(module, 0) + 1

        model.eval()
        with injection.whole.disabled(), torch.no_grad():
            with watched_inputs(model, {graft.site.module for graft in grafts if sees_vectors(graft.site)}, look):
                for batch in data:
                    batch.output()
            for graft in grafts:
                C = sums.get(graft.site.module) if sees_vectors(graft.site) else None
                graft.operator.decompose(graft.site, None if C is None else C / calls[graft.site.module])

    @staticmethod
    def parameter_count(site: Site, config: CorDAConfig) -> int:
        return low_rank_count(site, rank_within(site, config.rank))
