"""Gram matrices of the inputs of linear layers, and the factors by which a regression on them weighs each part of a
merge."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftcore import Injection, activate
from peftcore.author import Batches, Site, watched_inputs
from peftcore.errors import CalibrationError, ConfigError

LEAST = 1e-6
"""The share of the largest eigenvalue of the inputs' correlations below which others are rounding in float32."""
LARGEST_ERROR = 1e-3
"""The largest error of an inverse, as the largest distance of the sum of all shares from the identity."""


def gram_sites(sites: Iterable[Site]) -> list[Site]:
    """Return the sites that are weights of called linear layers, whose inputs are vectors."""
    layers = [(site, site.layer_of(site.module, site.tensor)) for site in sites]
    return [site for site, layer in layers if layer.called and layer.of_vectors and not layer.batch_dims]


def grams(injection: Injection, data: Iterable[Any], also: Sequence[str] = ()) -> dict[str, Tensor]:
    """Return X' X / n ``[in, in]`` by path for the linear layers at which an adapter acts, and those named in `also`
    (where other parts of a merge act): X are their inputs while the adapter acts alone, without padding.

    Args:
        injection: the adapter.
        data: batches of its task, as for `peftcore.apply`; labels are not needed.
        also: paths of more linear layers.

    Raises:
        ConfigError: there is nothing to look at, or the adapter is merged.
        CalibrationError: data is missing, a layer was not called, or inputs are not finite.
    """
    model = injection.model
    if injection.merged:
        raise ConfigError(f"{injection.name!r} is merged, and acts with others then; unmerge() it first")
    modules = {site.module: site.module_path for site in gram_sites(injection.sites)}
    named = dict(model.named_modules())
    if missing := [path for path in also if path not in named]:
        raise ConfigError(f"the model has no module {missing[0]!r}")
    modules |= {named[path]: path for path in also}
    if not modules:
        raise ConfigError(f"{injection.name!r} changes no weight of a linear layer that is called: it has a plain mean")
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def look(module: nn.Module, given: Tensor, x: Tensor) -> None:
        path = modules[module]
        sums[path] = sums.get(path, 0) + (x.mT @ x)
        counts[path] = counts.get(path, 0) + len(x)

    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad(), activate(model, injection.name), watched_inputs(model, modules, look):
            for batch in Batches(model, data, f"inputs with {injection.name}"):
                batch.output()
    finally:
        for module, mode in modes.items():
            module.training = mode
    for path in modules.values():
        if not counts.get(path) or not sums[path].isfinite().all():
            raise CalibrationError(f"{path} got no inputs, or some that are not finite; give other data")
    return {path: total / counts[path] for path, total in sums.items()}


def matrices_of(path: str, every: Sequence[Mapping[str, Tensor]], like: Tensor) -> Tensor:
    """Return the matrices of one layer for all parts, in float64 and in the shape of `like` ``[parts, in, in]``.

    Raises:
        ConfigError: a part lacks a matrix, or its matrix has another shape.
    """
    for index, given in enumerate(every):
        G = given.get(path)
        if G is None or G.shape != like.shape[1:] or not (G.isfinite().all() and (G.diagonal() >= 0).all()):
            raise ConfigError(
                f"part {index} has no matrix of the inputs of {path}, or one that does not fit: where it does not act "
                f"itself, grams(injection, data, also=[{path!r}]) makes one"
            )
    return torch.stack([given[path].to(like.device, torch.float64) for given in every])


def shares_of(path: str, G: Tensor, weights: Sequence[float], off_diagonal: float, base: bool = False) -> Tensor:
    """Return P ``[parts, in, in]`` for the matrices of the layer at a path; with `base`, zero in directions that no
    inputs have.

    Raises:
        CalibrationError: their sum is singular.
    """
    diagonal = G.diagonal(dim1=-2, dim2=-1)
    if base:  # not scaled as below: what is orthogonal to the inputs is to stay so
        G = off_diagonal * G + torch.diag_embed((1 - off_diagonal) * diagonal)
        G = torch.tensor(weights, dtype=G.dtype, device=G.device)[:, None, None] * G
        return G @ torch.linalg.pinv(G.sum(0), rtol=LEAST, hermitian=True)
    unseen = (diagonal == 0).all(0)  # such an input has the same weight in all parts
    G = off_diagonal * G + torch.diag_embed((1 - off_diagonal) * diagonal + unseen.to(G))
    G = torch.tensor(weights, dtype=G.dtype, device=G.device)[:, None, None] * G
    total = G.sum(0)
    root = total.diagonal().rsqrt()  # inputs differ much in size, and the inverse should not feel it
    inverse = torch.linalg.pinv(root[:, None] * total * root, rtol=LEAST, hermitian=True)
    shares = G @ (root[:, None] * inverse * root)
    error = shares.sum(0) * root[:, None] / root - torch.eye(len(root)).to(G)
    if error.abs().max() > LARGEST_ERROR:
        raise CalibrationError(
            f"the inputs of {path} were too few, or too much alike, for a regression: give more data, an off_diagonal "
            "below 1, or unseen='base'"
        )
    return shares
