"""What the gradient fusion of Mix-of-Show makes of three changed weights and their inputs, all of sines:
``python -m peftcore.testing.freeze mix_of_show.py CHECKOUT``.

Their file imports pipelines and pictures, which are not needed and stand empty, and names an infinity as numpy 1 does.
"""

from pathlib import Path

import numpy
import torch
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("others", "TencentARC/Mix-of-Show", "51270fd", "gradient_fusion.py")
VERSIONS = ("torch",)
CASES = {"many": (5, 9, 4), "few": (2, 1, 1)}
"""Rows of inputs of each concept: in all more than inputs, and fewer."""
INPUTS, OUTPUTS, RANK, ALPHA = 6, 5, 2, 0.75
ABSENT = ("diffusers", "mixofshow.models.edlora", "mixofshow.pipelines.pipeline_edlora", "mixofshow.utils.util")


def wave(*shape: int, phase: float = 0.0) -> Tensor:
    """Numbers that everybody can make again."""
    numbers = torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64)
    return torch.sin(numbers**1.5 + phase).view(shape)


def base() -> Tensor:
    """The weight without changes."""
    return wave(OUTPUTS, INPUTS)


def factors(concept: int) -> tuple[Tensor, Tensor]:
    """A and B of a concept."""
    return 0.5 * wave(RANK, INPUTS, phase=1.0 + concept), 0.5 * wave(OUTPUTS, RANK, phase=2.0 + concept)


def inputs(case: str, concept: int) -> Tensor:
    """Those of the layer with a concept."""
    return wave(CASES[case][concept], INPUTS, phase=5.0 + concept)


def numbers(checkout: Path) -> dict[str, list[float]]:
    """Returns the fused weight, flat."""
    vars(numpy).setdefault("Inf", numpy.inf)
    authors = load(checkout / SOURCE.script, root=checkout, absent=ABSENT)
    found = {}
    for case in CASES:
        given = [inputs(case, concept) for concept in range(3)]
        weights = [base() + ALPHA * B @ A for A, B in (factors(concept) for concept in range(3))]
        wanted = [rows @ weight.mT for rows, weight in zip(given, weights, strict=True)]
        fused = authors.update_quasi_newton(torch.cat(given), torch.cat(wanted), base(), 2000, "cpu")
        found[case] = fused.flatten().tolist()
    return found
