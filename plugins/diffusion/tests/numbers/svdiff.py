"""What SVDiff's authors' own code computes on five layers, its gradients, what it starts from and trains:
``python -m peftcore.testing.freeze svdiff.py CHECKOUT``.

Their file lacks two attributes that it reads, a residual of the decomposition and a cache; they are set to what leaves
the equation as it stands: zero, and none.
"""

from collections.abc import Callable
from pathlib import Path
from runpy import run_path
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source

SOURCE = Source("authors", "phymhan/SVDiff", "4ca843c", "utils_svd.py")
VERSIONS = ("torch",)


def wave(*shape: int) -> Tensor:
    """Numbers that everybody can make again."""
    return torch.sin(torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64) ** 1.5).view(shape)


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(4, 3), wave(2, 4)),
    "convolution": (lambda: nn.Conv2d(2, 3, 2), wave(1, 2, 3, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 2), wave(1, 2, 2, 2)),
    "embedding": (lambda: nn.Embedding(6, 3), torch.tensor([0, 2, 5])),
    "norm": (lambda: nn.GroupNorm(2, 4), wave(2, 4, 3)),
}


def layer_of(case: str) -> nn.Module:
    """Returns the case's layer in float64, its parameters waves."""
    layer = CASES[case][0]().double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(wave(*parameter.shape))
    return layer


def shifts(size: int) -> Tensor:
    """Returns a shift up, one down, and one below zero, which the authors cut where it shifts a singular value."""
    return torch.tensor([0.15, -0.2, -4.5, 0.05], dtype=torch.float64)[:size]


def run(case: str, spectral_shift: Callable[..., Any]) -> dict[str, list[float]]:
    layer = layer_of(case)
    module, shift = spectral_shift(layer)
    with torch.no_grad():
        shift.eigenvalues_delta.copy_(shifts(len(shift.eigenvalues_delta)))
    output = module(CASES[case][1])
    (output * wave(*output.shape)).sum().backward()
    return {"output": output.flatten().tolist(), "gradient": shift.eigenvalues_delta.grad.tolist()}


def code(checkout: Path) -> Callable[..., Any]:
    """Returns their function, which puts a module of shifts in front of a layer's weight."""
    theirs = run_path(str(checkout / SOURCE.script))
    theirs["_SpectralShift"].eigenvalues_delta_cached, theirs["_SpectralShift"]._residual = None, torch.zeros(())
    return theirs["spectral_shift"]


def numbers(checkout: Path) -> dict[str, dict[str, list[float]]]:
    """Returns outputs and gradients of each case."""
    spectral_shift = code(checkout)
    return {case: run(case, spectral_shift) for case in CASES}


def shifts_of(checkout: Path) -> dict[str, nn.Module]:
    """Returns the module of shifts that they make of the weight of each case."""
    spectral_shift = code(checkout)
    return {case: spectral_shift(layer_of(case))[1] for case in CASES}


def start(checkout: Path) -> dict[str, dict[str, list[float]]]:
    """Returns the shifts of each case."""
    return {case: {"delta": made.eigenvalues_delta.tolist()} for case, made in shifts_of(checkout).items()}


def trains(checkout: Path) -> dict[str, list[int]]:
    """Returns the sizes of the tensors that require a gradient, of the shifts of each case; what becomes of biases is
    left to a training that they did not publish."""
    made = shifts_of(checkout)
    return {case: [p.numel() for p in each.parameters() if p.requires_grad] for case, each in made.items()}
