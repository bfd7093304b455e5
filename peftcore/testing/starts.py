"""Compares initial values with those of reference code: `drawn` returns statistics of random values, for scripts that
store them, and `same_start` compares a tensor with them.

    # numbers/ssf.py, run with the authors' code          # the test
    def start(checkout):                                  start = frozen(NUMBERS, "start")
        return {"gain": drawn(theirs.ssf_scale)}          same_start(operator.gain, start["gain"])

Random values differ at each draw, so distributions are compared: the mean, standard deviation and kurtosis have to
agree within sampling errors, and the number of values outside of the reference's range has to be plausible.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftcore.testing.failures import CheckFailed

SIGMAS = 5.0
"""The number of sampling errors by which two draws of one distribution may differ; about one pair in a million differs
by more."""
FINEST = 0.05
"""The relative difference of standard deviations that a comparison must be able to detect."""


def drawn(tensor: Tensor) -> dict[str, float]:
    """Returns statistics of random values; if all values are equal, that value under the key "all"."""
    values = tensor.detach().double().flatten()
    if (values == values[0]).all():
        return {"all": values[0].item()}
    z = (values - values.mean()) / values.std()
    return {
        "count": len(values),
        "mean": values.mean().item(),
        "std": values.std().item(),
        "kurtosis": z.pow(4).mean().item(),
        "min": values.min().item(),
        "max": values.max().item(),
    }


def same_start(tensor: Tensor, told: Any) -> None:
    """Check that a tensor has the same initial values as the reference tensor, or the same distribution.

    Args:
        tensor: a tensor of a fresh injection; a random one needs tens of thousands of numbers.
        told: the result of `drawn` for the reference tensor, to compare distributions; or its values, as from
            ``tensor.tolist()``, which have to be equal up to the rounding of float32.

    Raises:
        CheckFailed: the initial values differ, or there are too few numbers to decide.
    """
    ours = tensor.detach().double().cpu()
    if not isinstance(told, Mapping):
        theirs = torch.tensor(told, dtype=torch.float64)
        if ours.shape != theirs.shape:
            raise CheckFailed(f"starts with the shape {list(ours.shape)}, theirs has {list(theirs.shape)}")
        if not torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max())):
            raise CheckFailed(f"starts up to {float((ours - theirs).abs().max()):.3g} away from theirs")
    elif "all" in told:
        if not (tensor == told["all"]).all():
            raise CheckFailed(f"does not start as {told['all']}: its values are {drawn(tensor)}")
    else:
        _same_distribution(ours.flatten(), told)


def _same_distribution(ours: Tensor, told: Mapping[str, float]) -> None:
    """Compare values with statistics of another draw.

    Raises:
        CheckFailed: they are not of one distribution, or too few.
    """
    found, n, m = drawn(ours), len(ours), told["count"]
    if "all" in found:
        raise CheckFailed(f"starts as {found['all']} everywhere, theirs is drawn with the deviation {told['std']:.4g}")
    error, z2 = SIGMAS * math.sqrt(1 / n + 1 / m), ((ours - ours.mean()) / ours.std()).square()
    allowed = {  # by the variance of each statistic, divided by the number of values
        "mean": error * told["std"],
        "std": error * told["std"] * math.sqrt((told["kurtosis"] - 1) / 4),
        "kurtosis": error * (z2.square() - 2 * found["kurtosis"] * z2).std().item(),
    }
    if allowed["std"] > FINEST * told["std"]:
        raise CheckFailed(f"{n} numbers of ours and {m} of theirs are too few to compare: use larger layers")
    for name, most in allowed.items():
        if abs(found[name] - told[name]) > most:
            raise CheckFailed(
                f"its {name} is {found[name]:.4g} at the start, theirs {told[name]:.4g}: chance leaves {most:.2g}"
            )
    outside = max(int((ours > told["max"]).sum()), int((ours < told["min"]).sum()))
    if outside > math.log(1e-6) / math.log(n / (n + m)):  # each of ours is a new extreme with the chance n / (n + m)
        raise CheckFailed(f"{outside} of {n} numbers start outside of [{told['min']:.4g}, {told['max']:.4g}]")
