"""Task arithmetic: the kit; peft's own function; the equation in float64 for several kinds of parts; parts out of
files; refusals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from merging_toys import X, applied, equal, host, moved
from peft.utils.merge_utils import task_arithmetic
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

import peftcore
from peftcore.errors import ConfigError, UnsupportedSite
from peftcore.testing import against, conformance
from peftcore_multitask import gather


@conformance("task_arithmetic")
def test_conformance(check: Callable[[], None]) -> None:
    check()


LORA = {"method": "lora", "rank": 2, "alpha": 3.0, "target": ["first", "second"]}
IA3 = {"method": "ia3", "target": ["first"]}


@against("peft 0.21", "task_arithmetic")
def test_the_numbers_of_peft() -> None:
    """Outputs, gradients, merged weights. Three LoRAs; the third has no site at the second weight, and counts as zeros
    there."""
    model, weights, new = host(), [0.7, -1.5, 2.0], {}
    parts = [LORA, LORA, {**LORA, "target": ["first"]}]
    injection = applied(model, "task_arithmetic", parts=parts, weights=weights, scale=0.5)
    for path, module in (("first", model.first), ("second", model.second)):
        factors = [part.factors() for part in injection.operators[path].parts.values()]
        taus = [scale * B @ A for A, B, scale in factors]
        taus += [torch.zeros_like(taus[0])] * (3 - len(taus))
        new[path] = module.weight.detach() + 0.5 * task_arithmetic(taus, torch.tensor(weights, dtype=torch.float64))
    expected = linear(torch.tanh(linear(X, new["first"], model.first.bias)), new["second"], model.second.bias)
    ours, every = model(X), list(injection.parameters())
    assert equal(ours, expected) and moved(model) and len(every) == 10
    for mine, theirs in zip(
        torch.autograd.grad(ours.square().sum(), every),
        torch.autograd.grad(expected.square().sum(), every),
        strict=True,
    ):
        assert equal(mine, theirs) and mine.abs().max() > 1e-4
    injection.merge()
    assert equal(model.first.weight, new["first"]) and equal(model.second.weight, new["second"])


def test_the_equation_with_factors_gains_and_a_bias() -> None:
    """LoRA at both weights, gains of the first and its bias, and the second's bias trained in place."""
    model = host()
    W1, b1, W2, b2 = (p.detach().clone() for p in model.parameters())
    parts = [LORA, IA3, {"method": "bitfit", "target": ["second"]}]
    injection = applied(model, "task_arithmetic", parts=parts, weights=[0.7, -1.5, 2.0], scale=0.5)
    first, second, bias = (
        injection.operators["first"],
        injection.operators["second"],
        injection.operators["second.bias"],
    )
    gain, value = first.parts["1"].gain, bias.parts["2"].value

    def low(operator: Any) -> torch.Tensor:
        A, B, scale = operator.parts["0"].factors()
        return scale * B @ A

    V1 = W1 + 0.5 * (0.7 * low(first) - 1.5 * (gain[:, None] * W1 - W1))
    c1 = b1 + 0.5 * -1.5 * (gain * b1 - b1)
    V2, c2 = W2 + 0.5 * 0.7 * low(second), b2 + 0.5 * 2.0 * (value - b2)
    expected = linear(torch.tanh(linear(X, V1, c1)), V2, c2)
    ours = model(X)
    assert equal(ours, expected) and moved(model)
    every = list(injection.parameters())
    for mine, theirs in zip(
        torch.autograd.grad(ours.square().sum(), every),
        torch.autograd.grad(expected.square().sum(), every),
        strict=True,
    ):
        assert equal(mine, theirs) and mine.abs().max() > 1e-3
    injection.merge()
    assert equal(model.first.weight, V1) and equal(model.first.bias, c1) and equal(model(X), expected)


def test_weights_that_are_trained_in_place_are_task_vectors() -> None:
    """As the authors have it: theta_0 + s (theta_1 - theta_0) + s (theta_2 - theta_0), tensor by tensor."""
    model = host()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    part = {"method": "linear_probe", "target": ["first", "second"]}
    injection = applied(model, "task_arithmetic", parts=[part, part], scale=0.3)
    expected = host()
    for path, operator in injection.operators.items():
        key = path if path in base else f"{path}.weight"
        one, two = (operator.parts[index].value.detach() for index in "01")
        expected.state_dict()[key].copy_(base[key] + 0.3 * (one - base[key]) + 0.3 * (two - base[key]))
    assert equal(model(X), expected(X)) and moved(model) and len(injection.operators) == 4


@pytest.mark.parametrize("kinds", [("lora", "linear_probe"), ("linear_probe", "lora")])
def test_values_and_factors_meet_where_the_weight_is_stored_the_other_way_round(kinds: tuple[str, str]) -> None:
    model = nn.Sequential(Conv1D(5, 6)).double()
    base = model[0].weight.detach().clone()
    parts = [{"method": kind, "target": ["0"]} for kind in kinds]
    injection = applied(model, "task_arithmetic", parts=parts, scale=0.5)
    of_kind = dict(zip(kinds, injection.operators["0"].parts.values(), strict=True))
    A, B, scale = of_kind["lora"].factors()
    injection.merge()
    expected = base + 0.5 * (scale * B @ A).T + 0.5 * (of_kind["linear_probe"].value - base)
    assert equal(model[0].weight, expected) and not equal(expected, base)


def test_a_task_and_its_negation_cancel_and_absent_sites_are_zero() -> None:
    model = host()
    parts = [LORA, LORA, {"method": "lora", "target": ["second"]}]
    injection = applied(model, "task_arithmetic", parts=parts, weights=[1.0, -1.0, 1.0], scale=1.0)
    with torch.no_grad():
        for operator in injection.operators.values():
            for mine, other in zip(operator.parts["0"].parameters(), operator.parts["1"].parameters(), strict=True):
                mine.copy_(other)
    A, B, scale = injection.operators["second"].parts["2"].factors()
    expected = host()
    expected.second.weight.data += scale * B @ A
    assert equal(model(X), expected(X)) and moved(model)


def test_parts_out_of_files_and_from_the_host(tmp_path: Path) -> None:
    model, deltas = host(), []
    for seed, part in enumerate((LORA, {"method": "vera", "rank": 3, "target": ["first"]})):
        injection = applied(
            model, part["method"], seed, name=f"a{seed}", **{k: v for k, v in part.items() if k != "method"}
        )
        injection.save(tmp_path / f"a{seed}")
        deltas.append(peftcore.deltas(injection))
    other, expected = host(), host()
    for path in deltas[0]:
        change = 0.5 * 2.0 * deltas[0][path] - 0.5 * deltas[1].get(path, torch.zeros(()))
        expected.get_submodule(path).weight.data += change
    made = gather(other, "task_arithmetic", {tmp_path / "a0": 2.0, str(tmp_path / "a1"): -1.0}, scale=0.5)
    assert equal(other(X), expected(X)) and moved(other)
    assert list(peftcore.injections(other)) == ["task_arithmetic"] and made.summary().trainable == 0
    here = gather(model, "task_arithmetic", {"a0": 2.0, "a1": -1.0}, scale=0.5)
    assert equal(model(X), expected(X)) and here.active and not peftcore.injections(model)["a0"].active
    made.save(tmp_path / "both")
    again = host()
    peftcore.load(again, tmp_path / "both")
    assert torch.equal(again(X), other(X))


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ([{"method": "houlsby_adapter"}], ConfigError, "changes of weights"),
        ([{"method": "adalora"}], ConfigError, "schedule"),
        ([{"rank": 2}], ConfigError, 'has no "method"'),
        ([{"method": "lora", "rnak": 2}], ConfigError, "did you mean 'rank'"),
        ([IA3, {"method": "bitfit", "target": ["first"]}], UnsupportedSite, "first.bias"),
    ],
)
def test_what_is_no_part(parts: list[dict[str, Any]], error: type[Exception], message: str) -> None:
    model = host()
    with pytest.raises(error, match=message):
        peftcore.apply(model, "task_arithmetic", parts=parts)
    with pytest.raises(ConfigError, match="1 weights for 2 parts"):
        peftcore.apply(model, "task_arithmetic", weights=[1.0])
    assert not peftcore.injections(model)
