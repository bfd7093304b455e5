"""Scores of weights by the gradients of a loss, before anything has trained: the higher, the more a weight matters."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from peftcore.author import Batches
from peftcore.errors import CalibrationError


def gradients(loss: Tensor, weights: list[Tensor], again: bool = False) -> list[Tensor]:
    """Return the gradients of a loss; with `again` they have gradients themselves."""
    return list(torch.autograd.grad(loss, weights, create_graph=again, allow_unused=True, materialize_grads=True))


def slopes(weights: list[Tensor], data: Batches) -> list[Tensor]:
    """Return the gradients of the sum of the losses of all batches."""
    sums = [torch.zeros_like(w) for w in weights]
    for batch in data:
        for total, gradient in zip(sums, gradients(batch.loss(), weights), strict=True):
            total += gradient
    return sums


def snip(weights: list[Tensor], data: Batches) -> list[Tensor]:
    """Return |w dL/dw| by weight."""
    return [(w.detach() * g).abs() for w, g in zip(weights, slopes(weights, data), strict=True)]


def grasp(weights: list[Tensor], data: Batches) -> list[Tensor]:
    """Return w (H g) by weight, where g and H are the gradient and the Hessian of the sum of the losses.

    Raises:
        CalibrationError: an operation of the model lacks a second derivative.
    """
    first = slopes(weights, data)
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        for batch in data:
            again = gradients(batch.loss(), weights, again=True)
            product = torch.stack([(a * b).sum() for a, b in zip(first, again, strict=True)]).sum()
            try:
                product.backward()  # the whole graph: without it, what has no second derivative would count as zero
            except RuntimeError as error:
                raise CalibrationError(f"the model has no second derivative ({error}); take score='snip'") from error
    return [torch.zeros_like(w) if w.grad is None else w.detach() * w.grad for w in weights]


SCORES = {"snip": snip, "grasp": grasp}
