"""TIES merging: the kit; numbers and gradients of peft's own function on the same changes; where the two differ."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from merging_toys import X, applied, equal, host, moved
from peft.utils.merge_utils import ties
from torch import Tensor
from torch.nn.functional import linear

import peftcore
from peftcore.testing import against, conformance

BOTH = ["first", "second"]


NAMED = "a module that is called merging is taken for one that merges patches"


@conformance(
    "ties_merging",
    expected_failures={f"modules_named_like_the_method_are_ordinary-{name}": NAMED for name in ("mlp", "convnet")},
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def low(part: Any) -> Tensor:
    A, B, scale = part.factors()
    return scale * B @ A


@pytest.mark.parametrize("density", [0.2, 0.6])
@against("peft 0.21", "ties_merging")
def test_the_numbers_of_peft(density: float) -> None:
    """Three LoRAs; the third has no site at the second weight, and counts as zeros there."""
    model = host()
    parts = [{"method": "lora", "rank": 3, "target": target} for target in (BOTH, BOTH, ["first"])]
    injection = applied(model, "ties_merging", parts=parts, density=density, scale=0.8)
    new = []
    for operator, module in (
        (injection.operators["first"], model.first),
        (injection.operators["second"], model.second),
    ):
        taus = [low(part) for part in operator.parts.values()]
        taus += [torch.zeros_like(taus[0])] * (3 - len(taus))
        new.append(module.weight.detach() + 0.8 * ties(taus, torch.ones(3, dtype=torch.float64), density))
    expected = linear(torch.tanh(linear(X, new[0], model.first.bias)), new[1], model.second.bias)
    ours, every = model(X), list(injection.parameters())
    assert equal(ours, expected) and moved(model) and len(every) == 10
    for mine, theirs in zip(
        torch.autograd.grad(ours.square().sum(), every),
        torch.autograd.grad(expected.square().sum(), every),
        strict=True,
    ):
        assert equal(mine, theirs) and mine.abs().max() > 1e-4
    injection.merge()
    assert equal(model.first.weight, new[0]) and equal(model.second.weight, new[1])


def test_gains_merge_as_changes_of_weight_and_bias() -> None:
    """(IA)^3 scales whole rows, so rows keep the mean of the gains that agree."""
    model = host()
    injection = applied(model, "ties_merging", parts=[{"method": "ia3", "target": ["first"]}] * 3, density=1.0)
    gains = torch.stack([part.gain.detach() for part in injection.operators["first"].parts.values()]) - 1
    elected = gains.sum(0).sign()
    kept = gains * (gains.sign() == elected)
    gain = 1 + kept.sum(0) / (kept != 0).sum(0)
    expected = host()
    expected.first.weight.data *= gain[:, None]
    expected.first.bias.data *= gain
    assert equal(model(X), expected(X)) and moved(model) and bool((kept == 0).any())


def test_weights_come_before_the_vote() -> None:
    """A negated part votes for its negation; in peft it would vote for what it is to undo."""
    model = host()
    part = {"method": "lora", "target": ["first"]}
    injection = applied(model, "ties_merging", parts=[part, part], weights=[1.0, -2.0], density=1.0)
    one, two = (low(each).detach() for each in injection.operators["first"].parts.values())
    change = peftcore.deltas(injection)["first"]
    agree = one.sign() == -two.sign()
    assert equal(change[agree], (one - 2 * two)[agree] / 2)
    larger = torch.where(one.abs() > 2 * two.abs(), one, -2 * two)
    assert equal(change[~agree], larger[~agree]) and 0.2 < agree.double().mean() < 0.8
    peft = ties([one, two], torch.tensor([1.0, -2.0], dtype=torch.float64), 1.0)
    assert not equal(change, peft) and moved(model)


def test_defaults_are_those_of_the_authors() -> None:
    """`K = 20`, in percent, `merge_func = "dis-mean"` and `lamda = 1` in src/ties_minimal.ipynb, and topk20 in the
    README, of prateeky2806/ties-merging at 44e7891: a fifth of each part, the sign of the larger sum, the mean as it
    is."""
    model, ones = host(), torch.ones(9, dtype=torch.float64)
    injection = applied(model, "ties_merging", parts=[{"method": "lora", "rank": 3, "target": ["first"]}] * 9)
    (operator,) = injection.operators.values()
    base, taus = model.first.weight.detach(), [low(part).detach() for part in operator.parts.values()]
    expected = base + ties(taus, ones, 0.2)
    assert not equal(expected, base + ties(taus, ones, 0.2, "frequency"))
    injection.merge()
    assert equal(model.first.weight, expected)
