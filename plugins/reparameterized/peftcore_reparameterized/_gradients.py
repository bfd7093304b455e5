"""The mean gradient of weights over the user's data."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from peftcore import Batch
from peftcore.author import AppliedMethod, Batches, Site, sees_vectors
from peftcore.errors import CalibrationError


def mean_gradients(sites: Sequence[Site], data: Iterable[Batch]) -> dict[str, Tensor]:
    """Return the mean gradient of each site's weight, ``[*batch, out, in * kernel]``, by the path of the site.

    For a linear layer it is the mean over the layer's calls, computed from inputs and from gradients of outputs. So
    quantized weights have a gradient too, and dense weights need no `grad`. For other tensors it is the mean over
    batches.
    """
    sums: dict[nn.Module, Tensor] = {}
    counts: defaultdict[nn.Module, int] = defaultdict(int)
    others = [(site, site.module.get_parameter(site.tensor)) for site in sites if not sees_vectors(site)]
    batches = 0

    def ran(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        x = next(iter((*args, *kwargs.values()))).detach()
        y = y if y.requires_grad else y.detach().requires_grad_()

        def add(gradient: Tensor) -> None:
            rows, inputs = (
                each.flatten(0, -2).to(torch.promote_types(x.dtype, torch.float32)) for each in (gradient, x)
            )
            sums[module] = sums.get(module, 0) + rows.T @ inputs
            counts[module] += 1

        y.register_hook(add)
        return y

    for _, weight in others:
        weight.requires_grad_(True)
    with ExitStack() as hooks:
        for module in {site.module for site in sites if sees_vectors(site)}:
            hooks.callback(module.register_forward_hook(ran, with_kwargs=True).remove)
        for batch in data:
            batches += 1
            if (loss := batch.loss()).requires_grad:
                loss.backward()
    found = {}
    for site in sites:
        if site.module in sums and sees_vectors(site):
            rows = sums[site.module] / counts[site.module]  # [out, in]
            found[site.path] = torch.cat([rows[slice(*each)] for each in site.slices]) if site.slices else rows
    for site, weight in others:
        if weight.grad is not None:
            mean = site.logical(weight.grad.to(torch.promote_types(weight.dtype, torch.float32))) / batches
            found[site.path] = mean.reshape(*site.batch, site.out_features, site.in_features * math.prod(site.kernel))
    return found


def gradients_of(
    grafts: Sequence[Any], model: nn.Module, data: Batches, injection: AppliedMethod
) -> Iterator[tuple[Any, Tensor]]:
    """Yield each entry of `grafts` (an adapted site) that the method installed, with the mean gradient of the site's
    weight. The model runs in training mode, with the adapter disabled. Sites without a gradient are skipped. These
    never ran, which is reported when the model is called.

    Raises:
        CalibrationError: a gradient is not finite.
    """
    own = [graft for graft in grafts if graft.by_method]
    model.train()
    torch.manual_seed(0)  # of dropout; the core puts the generators back
    with injection.whole.disabled():
        found = mean_gradients([graft.site for graft in own], data)
    for graft in own:
        gradient = found.get(graft.site.path)
        if gradient is None:
            continue
        if not gradient.isfinite().all():
            raise CalibrationError(f"the gradient of {graft.site.path} is not finite; pass other data")
        if gradient.any():
            yield graft, gradient
