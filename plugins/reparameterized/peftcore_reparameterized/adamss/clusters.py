"""Clusters of the outputs of a weight, by their directions. K-means starts as in scikit-learn with a fixed seed, so
that the clusters are the same as in libraries that use scikit-learn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftcore.author import Site, bias_name
from peftcore.errors import UnsupportedSite
from peftcore_reparameterized._basis import columns
from peftcore_reparameterized._decomposed import as_matrix, principal

SEED = 123456789
"""Seed of the random choice of the first centers, which is the seed in peft."""


def has_bias(site: Site) -> bool:
    """Whether the site's layer has a bias, which is then appended to the weight as a column."""
    bias = bias_name(site.tensor)
    return bias in site.tensors() and not site.missing(bias)


def shape(site: Site, config: Any) -> tuple[int, int]:
    """Return the number of clusters and of components."""
    out = site.out_features
    return min(config.subspaces, out), min(config.components, out, columns(site) + has_bias(site))


def with_bias(site: Site, base: bool = False) -> Tensor:
    """Return [W | b], [*batch, out, in * kernel + 1], or W if the layer has no bias. With `base`, the tensors are those
    of the base without the adapter.

    Raises:
        UnsupportedSite: weight and bias have different numbers of outputs.
    """
    W = site.base_weight().detach().reshape(*site.batch, site.out_features, -1) if base else as_matrix(site)
    if not has_bias(site):
        return W
    beside = site.at(bias_name(site.tensor))
    bias = (beside.base_weight() if base else beside.weight()).detach()
    if bias.numel() != W.shape[:-1].numel():
        raise UnsupportedSite(f"{site.path} has {W.shape[-2]} outputs, and a bias of {bias.numel()}")
    return torch.cat([W, bias.to(W).view(*W.shape[:-1], 1)], -1)


def subspaces(site: Site, config: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return V' ``[*batch, components, in * kernel (+ 1)]``, the cluster of each output ``[*batch, out]``, the rank of
    each cluster ``[*batch, K]`` and A ``[*batch, K, rank, components]``."""
    count, components = shape(site, config)
    if (W := with_bias(site)).is_meta:
        V, cluster = W.new_empty(*site.batch, components, W.shape[-1]), W.new_empty(W.shape[:-1], dtype=torch.long)
        ranks = cluster.new_empty(*site.batch, count)
        return V, cluster, ranks, W.new_empty(*ranks.shape, config.rank, components)
    each = [_of_matrix(matrix, count, components, config) for matrix in W.reshape(-1, *W.shape[-2:])]
    V, cluster, ranks, A = (torch.stack(found).view(*site.batch, *found[0].shape) for found in zip(*each, strict=True))
    return V, cluster, ranks, A


def _of_matrix(matrix: Tensor, count: int, components: int, config: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    U, V = approximate(matrix, components, config.projection_seed)
    cluster = clustered(U, count)
    ranks, A = cluster.new_zeros(count), U.new_zeros(count, config.rank, components)
    for index in range(count):
        own = U[cluster == index]
        most = min(config.rank, *own.shape)
        _, S, directions = principal(own, most)
        if config.threshold is not None:
            most = max(1, int(S.square().gt(config.threshold * S[0].square()).sum()))
        ranks[index] = most
        A[index, :most] = directions[:most]
    return V, cluster, ranks, A


def approximate(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return U ``[out, rank]`` and V' ``[rank, in]`` of the largest singular values. `torch.svd_lowrank` computes them
    in two iterations from random directions of `seed`, on the CPU and in float32."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        U, _, V = torch.svd_lowrank(matrix.float().cpu(), q=rank, niter=2)
    return U, V.mT.contiguous()


def clustered(rows: Tensor, count: int, iterations: int = 10) -> Tensor:
    """Return the cluster of each row, ``[rows]`` of dtype long, for rows ``[rows, width]``. `count` is at most the
    number of rows."""
    import numpy as np

    points = rows.double().cpu()
    points = points - points.mean(0)
    first = np.random.RandomState(SEED).choice(
        len(points), count, replace=False, p=np.full(len(points), 1 / len(points))
    )
    centers, labels = points[first.tolist()], points.new_full((len(points),), -1).long()
    enough = 1e-4 * points.var(0, correction=0).mean()
    for _ in range(iterations):
        before, labels = labels, _nearest(points, centers)
        moved = _means(points, centers, labels)
        shift, centers = (moved - centers).square().sum(), moved
        if torch.equal(labels, before):
            return labels
        if shift <= enough:
            break
    return _nearest(points, centers)


def _nearest(points: Tensor, centers: Tensor) -> Tensor:
    return (centers.square().sum(1) - 2 * points @ centers.mT).argmin(1)


def _means(points: Tensor, centers: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of each cluster. An empty cluster gets the point that is farthest from its center."""
    sums = torch.zeros_like(centers).index_add(0, labels, points)
    sizes = labels.bincount(minlength=len(centers)).to(sums)
    empty = sizes.eq(0).nonzero().flatten()
    farthest = (points - centers[labels]).square().sum(1).argsort(descending=True)[: len(empty)]
    for cluster, point in zip(empty.tolist(), farthest.tolist(), strict=True):
        sums[labels[point]] -= points[point]
        sizes[labels[point]] -= 1
        sums[cluster], sizes[cluster] = points[point], 1
    return sums / sizes.clamp(min=1).unsqueeze(1)
