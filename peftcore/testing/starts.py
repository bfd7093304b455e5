"""Compares initial values with those of reference code. `drawn` returns statistics of random values, which a script
stores in a file. `same_start` compares a tensor with such statistics.

    # numbers/ssf.py, run with the authors' code          # the test
    def start(checkout):                                  start = frozen(NUMBERS, "start")
        return {"gain": drawn(theirs.ssf_scale)}          same_start(operator.gain, start["gain"])

Random values are different each time, so their distributions are compared. Mean, standard deviation and kurtosis must
agree within sampling errors, and the number of values outside of the reference's range must be plausible.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftcore.testing.failures import CheckFailed

SIGMAS = 5.0
"""The largest accepted difference between the statistics of two samples, in sampling errors. About one in a million
pairs of samples from the same distribution differs by more."""
FINEST = 0.05
"""A comparison must be able to detect this relative difference of standard deviations. Otherwise there are too few
values."""


def drawn(tensor: Tensor) -> dict[str, float]:
    """Returns statistics of the values of a tensor. If all values are equal, it returns only this value, under the key
    "all"."""
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
    """Verify that a tensor has the same initial values as a tensor of reference code, or values of the same
    distribution.

    Args:
        tensor: a tensor of a fresh injection. If it is random, it must have tens of thousands of values.
        told: for random values, the result of `drawn` for the reference tensor. Otherwise the values of the reference
            tensor, as returned by ``tensor.tolist()``; they must be equal up to the rounding of float32.

    Raises:
        CheckFailed: the initial values differ, or there are too few random values for a comparison.
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
    """Compare values with statistics of another sample.

    Raises:
        CheckFailed: the distributions differ, or there are too few values.
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
