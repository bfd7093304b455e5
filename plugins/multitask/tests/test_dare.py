"""DARE: the kit; peft's own functions with our masks in the place of its draws; masks that stay."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft.utils.merge_utils as theirs
import pytest
import torch
from merging_toys import X, applied, equal, host, moved
from torch import Tensor
from torch.nn.functional import linear

import peftcore
from peftcore.testing import against, conformance


# The kit's smallest weight has 16 values, so not 0.9. In the mixture of experts, changes that are rescaled by 2 leave a
# host that bfloat16 is too coarse for: without any adapter, with the merged weights in it, it is as far off.
@conformance("dare", options={"*": {"drop_rate": 0.5}, "moe": {"drop_rate": 0.2}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


PARTS = [{"method": "lora", "rank": 3, "target": ["first", "second"]}] * 2


def low(part: Any) -> Tensor:
    A, B, scale = part.factors()
    return scale * B @ A


@pytest.mark.parametrize("merge", ["linear", "ties"])
@against("peft 0.21", "dare")
def test_the_numbers_of_peft_under_the_same_masks(merge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [1.5, -0.5] if merge == "linear" else [1.0, 1.0]  # peft votes before it weighs
    model = host()
    injection = applied(model, "dare", parts=PARTS, weights=weights, drop_rate=0.4, merge=merge, scale=0.7)
    new = {}
    for path, operator in injection.operators.items():
        masks = [operator.get_buffer(f"mask_{index}").double() for index in "01"]
        monkeypatch.setattr(torch, "bernoulli", lambda share, masks=masks: masks.pop(0) if share.max() == 0.6 else None)
        function = theirs.dare_linear if merge == "linear" else theirs.dare_ties
        taus = [low(part) for part in operator.parts.values()]
        change = function(taus, torch.tensor(weights, dtype=torch.float64), 0.6)
        new[path] = model.get_submodule(path).weight.detach() + 0.7 * change
        assert not masks
    expected = linear(torch.tanh(linear(X, new["first"], model.first.bias)), new["second"], model.second.bias)
    ours, every = model(X), list(injection.parameters())
    assert equal(ours, expected) and moved(model)
    for mine, other in zip(
        torch.autograd.grad(ours.square().sum(), every),
        torch.autograd.grad(expected.square().sum(), every),
        strict=True,
    ):
        assert equal(mine, other) and mine.abs().max() > 1e-4


def test_biases_are_thinned_out_too() -> None:
    model = host()
    injection = applied(model, "dare", parts=[{"method": "ia3", "target": ["first"]}], drop_rate=0.5)
    operator = injection.operators["first"]
    tau = (operator.parts["0"].gain.detach() - 1) * model.first.bias.detach()
    mask = operator.get_buffer("bias_mask_0")
    injection.merge()
    assert equal(model.first.bias, host().first.bias + 2 * tau * mask) and 0 < mask.sum() < 8


def masks(**options: Any) -> Tensor:
    model = torch.nn.Sequential(torch.nn.Linear(60, 50))
    injection = peftcore.apply(model, "dare", parts=[{"method": "lora", "target": ["0"]}] * 2, **options)
    (operator,) = injection.operators.values()
    return torch.stack([operator.get_buffer(f"mask_{index}") for index in "01"])


def test_masks_are_the_same_where_a_host_contains_the_model(tmp_path: Path) -> None:
    model, inputs = host(), torch.randn(3, 6, dtype=torch.float64)
    injection = applied(model, "dare", parts=PARTS, drop_rate=0.5)
    expected, plain = model(inputs), host()(inputs)
    injection.save(tmp_path)
    around = torch.nn.Sequential(host())
    peftcore.load(around, tmp_path)
    assert equal(around(inputs), expected) and not torch.allclose(expected, plain)


def test_masks_have_the_rate_and_depend_on_the_seed_and_the_part_alone() -> None:
    mine = masks(seed=1)
    assert all(abs(each.double().mean() - 0.1) < 0.02 for each in mine)  # 3000 draws: deviation 0.0055
    assert torch.equal(mine, masks(seed=2)) and not torch.equal(mine, masks(mask_seed=1))
    assert abs((mine[0] & mine[1]).double().mean() - 0.01) < 0.01


def test_the_mean_over_masks_is_the_change() -> None:
    model, times, total = host(), 150, 0.0
    tau = None
    for mask_seed in range(times):
        injection = applied(model, "dare", parts=PARTS[:1], drop_rate=0.5, mask_seed=mask_seed)
        tau = low(injection.operators["first"].parts["0"]).detach()
        total = total + peftcore.deltas(injection)["first"]
        injection.remove()
    assert ((total / times - tau).abs() < 5 * tau.abs() / times**0.5).all() and tau.abs().max() > 0.01


def test_files_bring_the_masks_back_without_holding_them(tmp_path: Path) -> None:
    model = host()
    injection = applied(model, "dare", parts=PARTS, drop_rate=0.5, mask_seed=7)
    injection.save(tmp_path)
    other = host()
    peftcore.load(other, tmp_path)
    assert torch.equal(other(X), model(X)) and moved(model)
    assert not [key for key in injection.state_dict() if "mask" in key]
