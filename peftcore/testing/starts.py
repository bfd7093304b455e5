"""Initial values: statistics of drawn ones for scripts that freeze them, and the comparison of a tensor with them.

    # numbers/ssf.py, run with the authors' code          # the test
    def start(checkout):                                  start = frozen(NUMBERS, "start")
        return {"gain": drawn(theirs.ssf_scale)}          same_start(operator.gain, start["gain"])

Of a draw no two are equal, so their distributions are compared: mean, deviation and kurtosis within what the number of
values leaves to chance, and how many values are outside the range that was drawn there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftcore.testing.failures import CheckFailed

SIGMAS = 5.0
"""Sampling errors by which two draws of one distribution may differ; of a million pairs, one differs by more."""
FINEST = 0.05
"""Relative difference of deviations that a comparison has to be able to see at least."""


def drawn(tensor: Tensor) -> dict[str, float]:
    """Returns statistics of values that were drawn at random; of values that are all equal, that value as "all"."""
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
    """Check that a tensor starts as the reference tensor does.

    Args:
        tensor: the tensor, of a fresh injection; where it is drawn, of tens of thousands of numbers.
        told: what `drawn` returned of the reference tensor, with which the distribution is compared; or its values, as
            ``tensor.tolist()`` gives them, which have to be the same up to the rounding of float32.

    Raises:
        CheckFailed: it starts otherwise, or there are too few numbers to decide.
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
