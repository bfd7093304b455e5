"""Writes `frozen_svdiff.json`: what SVDiff's authors' own code computes on five layers, and its gradients.

    python plugins/diffusion/tests/frozen_svdiff.py CHECKOUT      of phymhan/SVDiff at 4ca843c

Their file lacks two attributes that it reads, a residual of the decomposition and a cache; they are set to what leaves
the equation as it stands: zero, and none.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from runpy import run_path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).with_suffix(".json")


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


if __name__ == "__main__":
    checkout = Path(sys.argv[1])
    theirs = run_path(str(checkout / "utils_svd.py"))
    theirs["_SpectralShift"].eigenvalues_delta_cached, theirs["_SpectralShift"]._residual = None, torch.zeros(())
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, check=True, capture_output=True, text=True)
    frozen = {
        "repository": "phymhan/SVDiff",
        "commit": commit.stdout.strip(),
        "script": Path(__file__).name,
        "versions": {"torch": torch.__version__},
        "numbers": {case: run(case, theirs["spectral_shift"]) for case in CASES},
    }
    HERE.write_text(json.dumps(frozen, indent=1) + "\n", encoding="utf-8")
