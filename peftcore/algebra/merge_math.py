"""Adapter algebra on tensors: sums, means and merges of weight changes.

The functions are pure, and differentiable with respect to the tensors. A *delta* (task vector) is ``tau = W_adapted -
W_base`` at one site. It may have any shape, but all deltas of one call have the same shape. Weights may be negative.
For whole adapters see `peftcore.algebra.combining`.
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
    """Returns ``sum_t w_t tau_t``: task arithmetic (Ilharco et al., 2212.04089). A negative weight removes a task."""
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total = total + tensor * weight
    return total


def magnitude_prune(t: Tensor, density: float) -> Tensor:
    """Returns `t` with only its largest values by magnitude kept, a share of `density`; all others are set to 0.

    At least one value is kept. Of values with equal magnitude, all are kept or none, so there may be a few more. In
    contrast, peft keeps exactly ``int(density * n)`` values.
    """
    kept = max(int(density * t.numel()), 1)
    if kept >= t.numel():
        return t
    size = t.detach().abs()
    return t * (size >= size.flatten().kthvalue(t.numel() - kept + 1).values)


def random_mask(shape: Sequence[int], density: float, generator: torch.Generator) -> Tensor:
    """Returns a random mask on the generator's device. Each value is True with probability `density`, independently of
    the others."""
    return torch.rand(*shape, generator=generator, device=generator.device, dtype=torch.float32) < density


def random_prune(t: Tensor, density: float, generator: torch.Generator, rescale: bool = True) -> Tensor:
    """Returns `t` with values dropped at random, as in DARE (Yu et al., 2311.03099). Each value is kept with
    probability `density` (1 - p in the paper), and is otherwise set to 0. Kept values are divided by `density`, so that
    the mean over masks is `t`; without `rescale` they are not divided."""
    kept = t * random_mask(t.shape, density, generator).to(t.device)
    return kept / density if rescale else kept


def ties(tensors: Sequence[Tensor], weights: Sequence[float], density: float, sign: Sign = "total") -> Tensor:
    """Returns the TIES merge of deltas (Yadav et al., 2306.01708), in three steps. Trim: of each ``w_t tau_t``, the
    largest values by magnitude are kept, a share of `density`. Elect: each position gets the sign of the sum over
    tasks; with ``sign="frequency"``, the sign that most tasks have. Disjoint mean: the result is the mean of the kept
    values that have this sign.

    The code of the TIES authors trims the whole flattened model at once, and has no weights. Here each tensor is
    trimmed separately. If the tasks cancel exactly at a position, both use the sign that most values of the tensor
    have; peft uses +1. Also, peft elects signs before it multiplies by the weights, so a task with a negative weight
    votes for the sign that it should remove.
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
    """Returns the weighted sum of deltas, after values of each were dropped at random and the others rescaled (DARE,
    2311.03099)."""
    return linear([random_prune(t, density, generator) for t in tensors], weights)


def dare_ties(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    density: float,
    generator: torch.Generator,
    sign: Sign = "total",
    trim: float = 1.0,
) -> Tensor:
    """Returns the TIES merge of deltas, after values of each were dropped at random and the others rescaled (DARE,
    2311.03099). `trim` is the density for TIES. The code of the DARE authors uses 0.2; peft does not trim again, like
    the default here.
    """
    return ties([random_prune(t, density, generator) for t in tensors], weights, trim, sign)


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Returns the spherical interpolation between two tensors, taken as vectors (Shoemake 1985): `a` at t = 0, `b` at t
    = 1. If their directions are nearly equal or opposite, the interpolation is linear."""
    lengths = torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b)
    cosine = (a * b).sum() / lengths.clamp_min(torch.finfo(a.dtype).tiny)
    if abs(float(cosine)) > 0.9995:
        return torch.lerp(a, b, t)
    angle = torch.acos(cosine)
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def cat(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Returns the exact weighted sum of low-rank updates, as factors whose rank is the sum of the ranks. Each update
    has the factors A ``[*batch, rank, in, *kernel]`` and B ``[*batch, out, rank]``, and a scale. The factors are
    concatenated. In contrast, "linear" of peft sums all A and all B separately, each times ``sqrt(w s)``, so its result
    also contains products of A and B of different updates."""
    A = torch.cat([A for A, _, _ in factors], factors[0][1].dim() - 2)
    B = torch.cat([B * (scale * weight) for (_, B, scale), weight in zip(factors, weights, strict=True)], -1)
    return A, B, 1.0


def product(factors: Factors) -> Tensor:
    """Returns the delta ``[*batch, out, in, *kernel]`` of a low-rank update from its factors."""
    A, B, scale = factors
    lead = B.dim() - 1
    return scale * (B @ A.flatten(lead)).view(*B.shape[:-1], *A.shape[lead:])


def nearest(delta: Tensor, rank: int, batch_dims: int = 0, moment: Tensor | None = None) -> tuple[Factors, float]:
    """Returns the update of at most `rank` that is nearest to a delta ``[*batch, out, in, *kernel]``, and its relative
    error. Ranks that are only rounding errors are removed by `trimmed`.

    Distances are in the Frobenius norm (Eckart and Young 1936). `moment`, for a delta ``[out, in]``, is the second
    moment ``[in, in]`` of inputs. If it is given, distances are root mean squares of the outputs for these inputs. With
    ``moment = R R'``, the result is the B A for which B A R is nearest to delta R: B are the first left singular
    vectors of delta R, and A = B' delta. So no matrix is inverted.
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
    """Returns the same update, up to rounding, without the last ranks that contribute only rounding errors. The size of
    a rank's contribution is the norm of its column of B times the norm of its row of A, compared with the largest such
    product.
    """
    A, B, scale = factors
    lead = B.dim() - 1
    sizes = torch.linalg.vector_norm(B, dim=-2) * torch.linalg.vector_norm(A.flatten(lead), dim=-1)  # [*batch, rank]
    rounding = torch.finfo(sizes.dtype).eps * math.sqrt(max(B.shape[-2], A.flatten(lead).shape[-1]))
    counts = (sizes > rounding * sizes.amax(-1, keepdim=True)).nonzero()[:, -1]
    kept = 1 + int(counts.max()) if len(counts) else 0
    return A.narrow(lead - 1, 0, kept), B[..., :kept], scale
