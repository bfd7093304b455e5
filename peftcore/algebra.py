"""Adapter algebra: sums, means and merges of what adapters do to weights.

First pure functions of tensors, differentiable in the tensors: a *delta* (task vector) is ``tau = W_adapted - W_base``
of one site, of any shape, and all deltas of one call have the same shape. Then the same for whole adapters: `deltas`
reads them off, `to_lora` writes them as a LoRA, `combine` makes one adapter of several. Weights may be negative.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from peftcore.applying import check_name, establish, prepare
from peftcore.calls import ensure_state, injections
from peftcore.catalogue import method as find_method
from peftcore.checkpoint import load
from peftcore.config import validate
from peftcore.contract import Method, MethodConfig
from peftcore.errors import ConfigError, MergeError, NotMergeable, UnknownMethod, UnsupportedSite
from peftcore.injection import Injection
from peftcore.operators import Factors, _Base, is_mergeable
from peftcore.surgery import Wishes
from peftcore.targets import Site
from peftcore.weights import bias_name, put, take, whole

Sign = Literal["total", "frequency"]
How = Literal["cat", "linear", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune", "slerp"]
Source = str | os.PathLike[str]
"""An injection of the host by name, or the folder of a saved adapter."""
Records = dict[str, list[dict[str, Any]]]
"""Selections as files keep them, for `established`."""
LOSSY = 0.01
"""Relative error of a site from which on `combine` warns."""


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
    """True with probability `density`, each value for itself; drawn where the generator is."""
    return torch.rand(*shape, generator=generator, device=generator.device) < density


def random_prune(t: Tensor, density: float, generator: torch.Generator, rescale: bool = True) -> Tensor:
    """DARE (Yu et al., 2311.03099): each value of `t` is kept with probability `density` (1 - p in the paper) and then
    divided by it, so that the mean over masks is `t`; without `rescale` it is not."""
    kept = t * random_mask(t.shape, density, generator).to(t.device)
    return kept / density if rescale else kept


def ties(tensors: Sequence[Tensor], weights: Sequence[float], density: float, sign: Sign = "total") -> Tensor:
    """TIES (Yadav et al., 2306.01708): of each ``w_t tau_t`` the share `density` that is largest is kept (trim); each
    value gets the sign of the sum (elect; "frequency": of the more tasks); the result is the mean of the kept values
    that have it (disjoint mean).

    The authors' code trims the whole flattened model at once, here each tensor is for itself, and knows no weights. Where
    tasks cancel exactly it takes the sign that most values of the tensor have, as here; peft takes +1. peft elects before it
    multiplies by the weights, so that there a negated task votes for what it is to undo.
    """
    kept = torch.stack([magnitude_prune(t * w, density) for t, w in zip(tensors, weights, strict=True)])
    seen = kept.detach().sign()
    elected = (kept.detach() if sign == "total" else seen).sum(0).sign()
    majority = 1.0 if elected.sum() >= 0 else -1.0
    elected = torch.where(elected == 0, majority, elected)
    agree = (seen == elected) | (seen == 0).all(0)  # where no task says anything, the mean is 0 and all get its gradient
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
    authors' code goes on with 0.2 there, peft trims no more."""
    return ties([random_prune(t, density, generator) for t in tensors], weights, trim, sign)


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """From `a` (t = 0) to `b` (t = 1) along the arc between them (Shoemake 1985), each as one long vector; along the
    straight line where they have nearly one direction, or opposite ones."""
    lengths = torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b)
    cosine = (a * b).sum() / lengths.clamp_min(torch.finfo(a.dtype).tiny)
    if abs(float(cosine)) > 0.9995:
        return torch.lerp(a, b, t)
    angle = torch.acos(cosine)
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def cat(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """The exact weighted sum of low-rank updates, each A ``[*batch, rank, in, *kernel]``, B ``[*batch, out, rank]`` and
    a scale: the factors side by side, the ranks added. (peft's "linear" adds ``sqrt(w s)`` times A and B apart instead,
    which leaves products of unrelated factors in the sum.)"""
    A = torch.cat([A for A, _, _ in factors], factors[0][1].dim() - 2)
    B = torch.cat([B * (scale * weight) for (_, B, scale), weight in zip(factors, weights, strict=True)], -1)
    return A, B, 1.0


def product(factors: Factors) -> Tensor:
    """The delta ``[*batch, out, in, *kernel]`` of an update by its factors."""
    A, B, scale = factors
    lead = B.dim() - 1
    return scale * (B @ A.flatten(lead)).unflatten(-1, A.shape[lead:])


def svd(delta: Tensor, rank: int, batch_dims: int = 0) -> tuple[Factors, float]:
    """The nearest update of that rank to a delta ``[*batch, out, in, *kernel]`` (Eckart and Young 1936), and its error
    relative to the delta, both by the Frobenius norm. Ranks above the matrix's own are filled up with zeros."""
    U, S, V = torch.linalg.svd(delta.flatten(batch_dims + 1), full_matrices=False)
    root = S[..., :rank].sqrt()
    A = (root.unsqueeze(-1) * V[..., :rank, :]).unflatten(-1, delta.shape[batch_dims + 1 :])
    dropped, whole_norm = (float(torch.linalg.vector_norm(each)) for each in (S[..., rank:], S))
    return _padded((A, U[..., :rank] * root.unsqueeze(-2), 1.0), rank), dropped / whole_norm if whole_norm else 0.0


def _padded(factors: Factors, rank: int) -> Factors:
    """The same update with more columns, all zero; the scale in B."""
    A, B, scale = factors
    dim, missing = B.dim() - 2, rank - B.shape[-1]
    rows = A.new_zeros(*A.shape[:dim], missing, *A.shape[dim + 1 :])
    return torch.cat([A, rows], dim), torch.cat([B * scale, B.new_zeros(*B.shape[:-1], missing)], -1), 1.0


@dataclass(frozen=True, eq=False)
class Change:
    """What an adapter does to one tensor of the host."""

    site: Site
    delta: Tensor
    """In logical layout."""
    factors: Factors | None
    """Where the change is a product of few columns."""


def _precise(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _acting(injection: Injection) -> None:
    stuck = [graft.site.path for graft in injection.grafts if not is_mergeable(graft.operator)]
    if stuck:
        raise NotMergeable(
            f"{injection.method.name} makes no change of weights that algebra could use (first at {stuck[0]}): what it "
            "computes is no function of the weight alone"
        )
    if injection.merged:
        raise MergeError(f"{injection.name!r} is merged, so its base weights are not there; unmerge() it first")


@torch.no_grad()
def changes(injection: Injection) -> dict[str, Change]:
    """The effective minus the base weight of each tensor, by site path, in float32 or better. What the user named in
    ``train`` is left out: heads belong to one task.

    Raises:
        NotMergeable: an operator does not say what its effective weight is.
        MergeError: the injection is merged.
    """
    _acting(injection)
    found: dict[str, Change] = {}
    now: dict[tuple[str, str], Tensor] = {}  # as the operators before leave it, as it is stored
    for graft in injection.grafts:
        if graft.by_method:
            site, operator = graft.site, graft.operator
            base = _stored(site, now)
            weight = None if base is None else take(site.layer.logical(base), site.rows, site.layer.batch_dims)
            if type(operator).merged_bias is not _Base.merged_bias:
                _note(found, now, site.at(bias_name(site.tensor)), *_bias_change(site, operator, weight, now))
            _note(found, now, site, *_weight_change(operator, weight))
    return found


def _stored(site: Site, now: Mapping[tuple[str, str], Tensor]) -> Tensor | None:
    held = now.get((site.module_path, site.tensor))
    read = site.layer.read(site.module, site.tensor) if held is None else held
    return None if read is None else _precise(whole(read))


def _weight_change(operator: _Base, weight: Tensor | None) -> tuple[Tensor, Factors | None]:
    factors = None if weight is None else operator.factors()
    if factors is not None:
        factors = _precise(factors[0]), _precise(factors[1]), factors[2]
        return product(factors), factors
    new: Tensor = operator.merged(weight)  # type: ignore[arg-type]  # only replacements stand for a missing tensor
    return (_precise(new) if weight is None else new - weight), None


def _bias_change(
    site: Site, operator: _Base, weight: Tensor | None, now: Mapping[tuple[str, str], Tensor]
) -> tuple[Tensor | None, None]:
    stored = _stored(site.at(bias_name(site.tensor)), now)
    bias = None if stored is None else take(stored, site.rows, site.layer.batch_dims)
    assert weight is not None, "what changes a bias with a weight stands at a weight"
    new = operator.merged_bias(bias, lambda: weight)
    return (new if new is None or bias is None else new - bias), None


def _note(
    found: dict[str, Change],
    now: dict[tuple[str, str], Tensor],
    site: Site,
    delta: Tensor | None,
    factors: Factors | None,
) -> None:
    if delta is None or (factors is None and not delta.any()):
        return
    key, dims = (site.module_path, site.tensor), site.layer.batch_dims
    base = _stored(site, now)
    if base is None:
        now[key] = put(delta.new_zeros(delta.shape), delta, None, dims)
    else:
        logical = site.layer.logical(base)
        now[key] = site.layer.stored(put(logical, take(logical, site.rows, dims) + delta, site.rows, dims))
    if site.rows is None:  # a replacement sees the tensor as it is stored
        plain = site.layer_of(site.module, site.tensor)
        delta = plain.logical(site.layer.stored(delta))
    before = found.get(site.path)
    if before is not None:
        both = before.factors is not None and factors is not None
        factors = cat([before.factors, factors], [1.0, 1.0]) if both else None  # type: ignore[list-item]
        delta = before.delta + delta
    found[site.path] = Change(site, delta, factors)


def deltas(injection: Injection) -> dict[str, Tensor]:
    """The change that an adapter makes to each tensor, by site path, in logical layout ``[*batch, out, in, *kernel]``
    and in float32 or better; nothing for tensors that it leaves as they are.

    Raises:
        NotMergeable: the method makes no change of weights.
        MergeError: the injection is merged.
    """
    return {path: change.delta for path, change in changes(injection).items()}


def records(injection: Injection) -> Records:
    """What each selection of an injection found, as `established` takes it."""
    return {key: [_record(site) for site in sites] for key, sites in injection.selections.items()}


def _record(site: Site) -> dict[str, Any]:
    role = None if site.role is not None and site.form == "weight" and site.role.endswith(".output") else site.role
    return {"module_path": site.module_path, "tensor": site.tensor, "role": role, "rows": site.rows}


def established(
    injections_of: Sequence[Injection],
    method: type[Method],
    config: MethodConfig,
    name: str,
    found: Records,
    dtype: torch.dtype,
    train: tuple[str, ...] = (),
) -> Injection:
    """A new injection of a method at sites that are known already. It is frozen and acts in the place of those that it
    comes from."""
    raise NotImplementedError
