"""Adapter algebra on tensors: sums, means and merges of weight changes.

Pure functions, differentiable in the tensors. A *delta* (task vector) is ``tau = W_adapted - W_base`` of one site, of
any shape; all deltas of one call have the same. Weights may be negative. For whole adapters see
`peftcore.algebra.combining`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from peftcore.contract.operators import Factors

Sign = Literal["total", "frequency"]


def linear(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum_t w_t tau_t``: task arithmetic (Ilharco et al., 2212.04089); a negative weight forgets a task."""
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total = total + tensor * weight
    return total


def magnitude_prune(t: Tensor, density: float) -> Tensor:
    """`t` with the share `density` of its values that are largest by magnitude, the others 0.

    Values as large as the smallest that is kept are kept too, and at least one is (peft keeps exactly
    ``int(density * n)``, whichever of equal ones).
    """
    kept = max(int(density * t.numel()), 1)
    if kept >= t.numel():
        return t
    size = t.detach().abs()
    return t * (size >= size.flatten().kthvalue(t.numel() - kept + 1).values)


def random_mask(shape: Sequence[int], density: float, generator: torch.Generator) -> Tensor:
    """Returns a mask that is True with probability `density`, each value by itself; drawn on the generator's device."""
    return torch.rand(*shape, generator=generator, device=generator.device, dtype=torch.float32) < density


def random_prune(t: Tensor, density: float, generator: torch.Generator, rescale: bool = True) -> Tensor:
    """DARE (Yu et al., 2311.03099): each value of `t` is kept with probability `density` (1 - p in the paper) and then
    divided by it, so that the mean over masks is `t`. Without `rescale` kept values are not divided."""
    kept = t * random_mask(t.shape, density, generator).to(t.device)
    return kept / density if rescale else kept


def ties(tensors: Sequence[Tensor], weights: Sequence[float], density: float, sign: Sign = "total") -> Tensor:
    """TIES (Yadav et al., 2306.01708): of each ``w_t tau_t`` the share `density` that is largest is kept (trim); each
    value gets the sign of the sum (elect; "frequency": of the more tasks); the result is the mean of the kept values
    that have it (disjoint mean).

    The authors' code trims the whole flattened model at once and does not have weights; here each tensor is trimmed
    separately. If tasks cancel exactly, the authors' code takes the sign that most values of the tensor have, as here;
    peft takes +1. peft elects before it multiplies by the weights, so that there a task with a negative weight votes
    for the sign that it is meant to undo.
    """
    kept = torch.stack([magnitude_prune(t * w, density) for t, w in zip(tensors, weights, strict=True)])
    seen = kept.detach().sign()
    elected = (kept.detach() if sign == "total" else seen).sum(0).sign()
    majority = torch.where(elected.sum() >= 0, 1, -1).to(elected)
    elected = torch.where(elected == 0, majority, elected)
    # where no task says anything, the mean is 0 and all tasks get its gradient
    agree = (seen == elected) | (seen == 0).all(0)
    return (kept * agree).sum(0) / agree.sum(0).clamp_min(1)


def dare_linear(
    tensors: Sequence[Tensor], weights: Sequence[float], density: float, generator: torch.Generator
) -> Tensor:
    """The weighted sum of deltas that were dropped at random and rescaled (2311.03099)."""
    return linear([random_prune(t, density, generator) for t in tensors], weights)


def dare_ties(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    density: float,
    generator: torch.Generator,
    sign: Sign = "total",
    trim: float = 1.0,
) -> Tensor:
    """TIES of deltas that were dropped at random and rescaled (2311.03099). `trim` is the density for TIES itself: the
    authors' code uses 0.2 there, peft does not trim again.
    """
    return ties([random_prune(t, density, generator) for t in tensors], weights, trim, sign)


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Returns the point from `a` (t = 0) to `b` (t = 1) along the arc between them (Shoemake 1985), each as one long
    vector; along the straight line where they have nearly one direction, or opposite ones."""
    lengths = torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b)
    cosine = (a * b).sum() / lengths.clamp_min(torch.finfo(a.dtype).tiny)
    if abs(float(cosine)) > 0.9995:
        return torch.lerp(a, b, t)
    angle = torch.acos(cosine)
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def cat(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Returns the exact weighted sum of low-rank updates, each A ``[*batch, rank, in, *kernel]``, B ``[*batch, out,
    rank]`` and a scale: the factors are concatenated, the ranks added. (peft's "linear" adds ``sqrt(w s)`` times A and
    B apart instead, which leaves products of unrelated factors in the sum.)"""
    A = torch.cat([A for A, _, _ in factors], factors[0][1].dim() - 2)
    B = torch.cat([B * (scale * weight) for (_, B, scale), weight in zip(factors, weights, strict=True)], -1)
    return A, B, 1.0


def product(factors: Factors) -> Tensor:
    """Returns the delta ``[*batch, out, in, *kernel]`` of an update by its factors."""
    A, B, scale = factors
    lead = B.dim() - 1
    return scale * (B @ A.flatten(lead)).view(*B.shape[:-1], *A.shape[lead:])


def nearest(delta: Tensor, rank: int, batch_dims: int = 0, moment: Tensor | None = None) -> tuple[Factors, float]:
    """Returns the nearest update of at most a rank to a delta ``[*batch, out, in, *kernel]``, trimmed, and its error
    relative to the delta.

    Both are by the Frobenius norm (Eckart and Young 1936), or for a delta ``[out, in]`` by its outputs for inputs with
    a second moment ``[in, in]``, as root mean squares over these inputs. With ``moment = R R'`` that is B A R nearest
    to delta R: B are the first left singular vectors of delta R, and A = B' delta, so that nothing is inverted.
    """
    matrix = delta.flatten(batch_dims + 1)
    if moment is None:
        U, S, V = torch.linalg.svd(matrix, full_matrices=False)
        root = S[..., :rank].sqrt()
        A, B = root.unsqueeze(-1) * V[..., :rank, :], U[..., :rank] * root.unsqueeze(-2)
    else:
        values, vectors = torch.linalg.eigh(moment)
        U, S, _ = torch.linalg.svd(matrix @ (vectors * values.clamp_min(0).sqrt()), full_matrices=False)
        A, B = U[:, :rank].mT @ matrix, U[:, :rank]
    dropped, whole_norm = (float(torch.linalg.vector_norm(each)) for each in (S[..., rank:], S))
    factors = trimmed((A.unflatten(-1, delta.shape[batch_dims + 1 :]), B, 1.0))
    return factors, dropped / whole_norm if whole_norm else 0.0


def trimmed(factors: Factors) -> Factors:
    """Returns the same update, up to rounding, without the last columns that consist of rounding errors: those whose
    products are too small, compared with the largest one, to be distinguished from zero.
    """
    A, B, scale = factors
    lead = B.dim() - 1
    sizes = torch.linalg.vector_norm(B, dim=-2) * torch.linalg.vector_norm(A.flatten(lead), dim=-1)  # [*batch, rank]
    rounding = torch.finfo(sizes.dtype).eps * math.sqrt(max(B.shape[-2], A.flatten(lead).shape[-1]))
    counts = (sizes > rounding * sizes.amax(-1, keepdim=True)).nonzero()[:, -1]
    kept = 1 + int(counts.max()) if len(counts) else 0
    return A.narrow(lead - 1, 0, kept), B[..., :kept], scale
