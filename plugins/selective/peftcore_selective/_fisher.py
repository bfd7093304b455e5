"""Fisher information of weights: squares of gradients, before training."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from peftcore import Batch


def squared_gradients(
    parameters: Iterable[nn.Parameter], data: Iterable[Batch], max_norm: float | None = None
) -> dict[nn.Parameter, Tensor]:
    """Return the sum over the batches of (dL/dp)^2 for each parameter p. The gradient of each parameter is first
    clipped to the norm `max_norm`.

    The sum ranks weights as the mean over the batches does. The `grad` of all parameters is unchanged, also of
    parameters of other active adapters.
    """
    sums = {p: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters}
    for batch in data:
        gradients = torch.autograd.grad(batch.loss(), list(sums), allow_unused=True)
        for total, gradient in zip(sums.values(), gradients, strict=True):
            if gradient is None:  # not used by this batch
                continue
            clip = 1.0 if max_norm is None else (max_norm / (gradient.norm() + 1e-6)).clamp(max=1.0)
            total.add_((gradient * clip).to(total.dtype).square())
    return sums
