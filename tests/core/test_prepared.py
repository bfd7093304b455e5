"""What an operator beside the weight needs that no input changes: made once in evaluation, while nothing it comes of
changes."""

import copy
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from call_toys import fill
from core_toys import perceptron
from torch import Tensor, nn

import peftcore
from peftcore import Method, MethodConfig, Tags, route
from peftcore.contract.operators import Held, WeightOperator
from peftcore.forward.cache import EffectiveWeightCache
from peftcore.forward.slot import slot_of

INPUT = torch.linspace(-1, 1, 20).view(5, 4)


class BesideOperator(WeightOperator):
    """Adds its vector times the norm of the weight, [out], to what the module returns."""

    def __init__(self, site: Any, config: Any) -> None:
        super().__init__(site)
        self.shift = nn.Parameter(torch.zeros(site.out_features))
        self.made: list[str] = []

    def prefers_activation_form(self, x: Tensor) -> bool:
        return True

    def prepare(self, held: Held) -> Tensor:
        self.made.append("prepared")
        return self.shift * held.weight.norm()

    def activation_form(self, call: Callable[..., Tensor], x: Tensor, prepared: Tensor) -> Tensor:
        return call(x) + prepared * x.sum(-1, keepdim=True)

    def forward(self, weight: Tensor) -> Tensor:
        self.made.append("weight")
        return weight + (self.shift * weight.norm())[:, None]


class BesideConfig(MethodConfig):
    """No options."""

    method: Literal["toy_beside"] = "toy_beside"


class BesideMethod(Method):
    """`BesideOperator` at each site."""

    name = "toy_beside"
    Config = BesideConfig
    tags = Tags(category="reparameterized", paper="none", mergeable=True)

    def inject(self, model: nn.Module, config: Any, surgeon: Any) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, BesideOperator, config)

    @staticmethod
    def parameter_count(site: Any, config: Any) -> int:
        return site.out_features


@pytest.fixture
def adapted() -> tuple[nn.Module, peftcore.Injection, BesideOperator]:
    model = perceptron().eval()
    injection = peftcore.apply(model, BesideMethod, target="first")
    fill(injection, 0)
    injection.low_memory = True
    return model, injection, injection.operators["first"]  # type: ignore[return-value]


@torch.no_grad()
def made(model: nn.Module, operator: BesideOperator) -> list[str]:
    """What one evaluation makes, and that it computes what the weight form does."""
    operator.made.clear()
    output = model.first(INPUT)
    made = list(operator.made)
    weight = operator(nn.Linear.__getattr__(model.first, "weight"))
    torch.testing.assert_close(output, nn.functional.linear(INPUT, weight, model.first.bias))
    return made


def test_in_evaluation_it_is_prepared_once(adapted: Any) -> None:
    model, _, operator = adapted
    assert [made(model, operator) for _ in range(3)] == [["prepared"], [], []]
    with torch.inference_mode():
        operator.made.clear()
        assert torch.isfinite(model(INPUT)).all() and operator.made == ["prepared"]


@pytest.mark.parametrize(
    "change",
    [
        lambda model, operator: operator.shift.add_(1),
        lambda model, operator: setattr(operator, "shift", nn.Parameter(torch.ones(6))),
        lambda model, operator: model.first.weight.mul_(2),
        lambda model, operator: setattr(model.first, "weight", nn.Parameter(torch.ones(6, 4))),
        lambda model, operator: model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}),
        lambda model, operator: setattr(model.first.bias, "data", torch.ones(6)),
    ],
)
def test_it_is_prepared_anew_when_what_it_comes_of_changes(adapted: Any, change: Callable[..., Any]) -> None:
    model, _, operator = adapted
    made(model, operator)
    with torch.no_grad():
        change(model, operator)
    assert [made(model, operator), made(model, operator)] == [["prepared"], []]


def test_training_keeps_nothing(adapted: Any) -> None:
    model, injection, operator = adapted
    made(model, operator)
    assert slot_of(model.first).cache
    injection.low_memory = False
    model(INPUT).sum().backward()
    assert operator.shift.grad is not None and operator.shift.grad.any()
    assert not slot_of(model.first).cache
    model.train()
    operator.made.clear()
    with torch.no_grad():
        model(INPUT), model(INPUT)
    assert operator.made == ["prepared", "prepared"]


def test_a_frugal_one_makes_the_weight_in_training_and_keeps_none_in_evaluation(adapted: Any) -> None:
    model, injection, operator = adapted
    operator.made.clear()
    model(INPUT).sum().backward()
    assert operator.made == ["weight", "weight"]  # and again in backward
    injection.low_memory = False
    assert [made(model, operator), made(model, operator)] == [["weight"], []]


def test_rows_of_several_are_prepared_once_until_they_train(adapted: Any) -> None:
    model, injection, operator = adapted
    injection.low_memory = False
    other = peftcore.apply(model, BesideMethod, name="other", target="first")
    fill(other, 1)
    with torch.no_grad(), peftcore.activate(model, injection.name):
        expected = model(INPUT)[:2]
    with route(model, [injection.name] * 2 + ["other"] * 3):
        with torch.no_grad():
            operator.made.clear()
            model(INPUT)
            torch.testing.assert_close(model(INPUT)[:2], expected)
        assert operator.made == ["prepared"]
        assert slot_of(model.first).cache
        model(INPUT).sum().backward()
        assert not slot_of(model.first).cache


def test_copies_keep_nothing(adapted: Any) -> None:
    model, _, operator = adapted
    made(model, operator)
    assert slot_of(model.first).cache and not slot_of(copy.deepcopy(model).first).cache


def test_another_tensor_in_the_place_of_one_that_is_gone_is_another() -> None:
    """Its identity, its address and its counter may all be those of the one before."""
    kept = EffectiveWeightCache()
    memory = torch.zeros(3).numpy()

    def read() -> float:
        return float(kept.get("sum", [torch.from_numpy(memory)], (), lambda: float(memory.sum())))

    assert read() == 0
    memory += 1
    assert read() == 3
