"""Hosts whose weights are computed from others, in every way that torch has."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm


class Twice(nn.Module):
    """A parametrization that can give any value."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / 2


class Bounded(nn.Module):
    """A parametrization without an inverse."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.tanh()


class Rank(nn.Module):
    """A parametrization by two tensors, whose inverse is an approximation."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        U, S, V = torch.linalg.svd(weight, full_matrices=False)
        return U[:, :2] * S[:2], V[:2]


def _parametrized(*steps: type[nn.Module]) -> Callable[[nn.Module], Any]:
    def put(module: nn.Module) -> None:
        for step in steps:
            parametrize.register_parametrization(module, "weight", step())

    return put


def _silently(put: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Any]:
    def quiet(module: nn.Module) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            put(module)
        for parameter in module.parameters():
            parameter.requires_grad_(False)

    return quiet


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "with an inverse": _parametrized(Twice),
    "without an inverse": _parametrized(Bounded),
    "by two tensors": _parametrized(Rank),
    "two steps": _parametrized(Twice, Bounded),
    "old weight_norm": _silently(old_weight_norm),
    "old spectral_norm": _silently(old_spectral_norm),
    "pruned": lambda module: prune.l1_unstructured(module, "weight", 0.5),
    "pruned twice": lambda module: [prune.random_unstructured(module, "weight", 0.3) for _ in range(2)],
}
KEPT = ("weight_norm", "with an inverse")
"""Those that can give the merged value, so they stay."""
CONVOLUTIONS = ("weight_norm", "spectral_norm", "without an inverse", "old weight_norm", "pruned")
