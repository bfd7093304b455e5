"""What is computed from weights is kept in a block of `cache_weights` and in a call of `generate`, and nowhere else:
effective weights, and what an operator beside the weight prepares."""

import copy
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from call_toys import fill
from core_toys import Shift, ShiftOperator, perceptron, run_without_gradients
from torch import Tensor, nn

import peftcore
from peftcore import cache_weights, route
from peftcore.author import Method, MethodConfig, Tags
from peftcore.contract.operators import Held, WeightOperator
from peftcore.forward.state.slot import slot_of
from peftcore.forward.tensors.cache import WeightCache


class Counting(ShiftOperator):
    """Counts how often the effective weight is built."""

    def forward(self, weight: Tensor) -> Tensor:
        self.count = getattr(self, "count", 0) + 1
        return super().forward(weight)


@pytest.fixture
def counted() -> tuple[nn.Module, peftcore.Injection, Counting]:
    model = perceptron()
    injection = peftcore.apply(model, Shift, target="first")
    operator = injection.operators["first"]
    operator.__class__ = Counting
    operator.count = 0
    return model, injection, operator  # type: ignore[return-value]


def built(counted: tuple[nn.Module, peftcore.Injection, Counting]) -> int:
    """How many times one evaluation builds the weight now."""
    model, _, operator = counted
    before = operator.count
    run_without_gradients(model, torch.ones(1, 4))
    return operator.count - before


def held(module: nn.Module) -> bool:
    """Whether the open cache holds anything; False where none is open."""
    slot = slot_of(module)
    assert slot is not None
    return bool(slot.cache)


def test_outside_of_a_block_each_evaluation_builds_the_weight(counted: Any) -> None:
    assert [built(counted) for _ in range(3)] == [1, 1, 1]


def test_in_a_block_evaluation_builds_the_weight_once(counted: Any) -> None:
    with cache_weights(counted[0]):
        assert [built(counted) for _ in range(4)] == [1, 0, 0, 0]
    assert [built(counted), built(counted)] == [1, 1]


@pytest.mark.parametrize("many", [False, True], ids=["fused", "foreach"])
def test_in_a_block_changes_that_torch_counts_are_seen(counted: Any, many: bool) -> None:
    model, injection, operator = counted
    with cache_weights(model):
        built(counted)
        with torch.no_grad():
            operator.shift.add_(1)
        assert [built(counted), built(counted)] == [1, 0]
        with torch.no_grad():
            model.first.weight.mul_(2)
        assert [built(counted), built(counted)] == [1, 0]
        model.load_state_dict({key: value + 1 for key, value in model.state_dict().items()})
        assert built(counted) == 1
        model.first.weight = nn.Parameter(torch.zeros(6, 4), requires_grad=False)
        assert built(counted) == 1
        optimizer = torch.optim.SGD(injection.parameters(), lr=0.1, fused=not many, foreach=many)
        before = run_without_gradients(model, torch.ones(1, 4))
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        assert not torch.equal(run_without_gradients(model, torch.ones(1, 4)), before)


def test_forward_with_gradients_drops_what_is_kept(counted: Any) -> None:
    model, _, _ = counted
    with cache_weights(model):
        built(counted)
        assert held(model.first)
        model(torch.ones(1, 4))
        assert not held(model.first)


def test_nothing_is_kept_in_training_mode_and_with_low_memory(counted: Any) -> None:
    model, injection, _ = counted
    with cache_weights(model):
        model.train()
        assert [built(counted), built(counted)] == [1, 1]
        model.eval()
        injection.low_memory = True
        assert [built(counted), built(counted)] == [1, 1]
        assert not held(model.first)


def test_switching_and_merging_in_a_block(counted: Any) -> None:
    model, injection, _ = counted
    with cache_weights(model):
        adapted = run_without_gradients(model, torch.ones(1, 4))
        with injection.disabled():
            bare = run_without_gradients(model, torch.ones(1, 4))
        assert not torch.equal(adapted, bare)
        assert torch.equal(run_without_gradients(model, torch.ones(1, 4)), adapted)
        injection.merge()
        torch.testing.assert_close(run_without_gradients(model, torch.ones(1, 4)), adapted)
        injection.unmerge()
        assert torch.equal(run_without_gradients(model, torch.ones(1, 4)), adapted)
        injection.remove()
        assert torch.equal(run_without_gradients(model, torch.ones(1, 4)), bare)


def test_inference_mode_and_no_grad_agree(counted: Any) -> None:
    model, _, _ = counted
    with cache_weights(model):
        with torch.inference_mode():
            inference = model(torch.ones(1, 4)).clone()
        assert torch.equal(run_without_gradients(model, torch.ones(1, 4)), inference)
        model(torch.ones(1, 4)).sum().backward()  # nothing of inference mode is left in the graph


def test_effective_weight_is_not_saved_for_backward() -> None:
    """In training it is computed again: a step holds no copy of the weight from forward to backward."""
    model = nn.ModuleDict({"inner": nn.Linear(256, 256, bias=False)})
    peftcore.apply(model, "dora", target="inner", rank=1)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() >= 256 * 256 and tensor.data_ptr() != model["inner"].weight.data_ptr():
            saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model["inner"](torch.randn(2, 256, requires_grad=True))
        assert saved == []
    output.sum().backward()


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


def test_in_a_block_it_is_prepared_once(adapted: Any) -> None:
    model, _, operator = adapted
    assert [made(model, operator) for _ in range(2)] == [["prepared"], ["prepared"]]
    with cache_weights(model):
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
    with cache_weights(model):
        made(model, operator)
        with torch.no_grad():
            change(model, operator)
        assert [made(model, operator), made(model, operator)] == [["prepared"], []]


def test_training_keeps_nothing(adapted: Any) -> None:
    model, injection, operator = adapted
    with cache_weights(model):
        made(model, operator)
        assert held(model.first)
        injection.low_memory = False
        model(INPUT).sum().backward()
        assert operator.shift.grad is not None and operator.shift.grad.any()
        assert not held(model.first)
        model.train()
        operator.made.clear()
        with torch.no_grad():
            model(INPUT), model(INPUT)
        assert operator.made == ["prepared", "prepared"]


def test_with_low_memory_the_weight_is_computed_in_training_and_kept_in_no_evaluation(adapted: Any) -> None:
    model, injection, operator = adapted
    operator.made.clear()
    model(INPUT).sum().backward()
    assert operator.made == ["weight", "weight"]  # and again in backward
    injection.low_memory = False
    assert [made(model, operator), made(model, operator)] == [["prepared"], ["prepared"]]
    with cache_weights(model):
        assert [made(model, operator), made(model, operator)] == [["weight"], []]


def test_rows_of_several_are_prepared_once_until_they_train(adapted: Any) -> None:
    model, injection, operator = adapted
    injection.low_memory = False
    other = peftcore.apply(model, BesideMethod, name="other", target="first")
    fill(other, 1)
    with torch.no_grad(), peftcore.activate(model, injection.name):
        expected = model(INPUT)[:2]
    with route(model, [injection.name] * 2 + ["other"] * 3), cache_weights(model):
        with torch.no_grad():
            operator.made.clear()
            model(INPUT)
            torch.testing.assert_close(model(INPUT)[:2], expected)
        assert operator.made == ["prepared"]
        assert held(model.first)
        model(INPUT).sum().backward()
        assert not held(model.first)


def test_copies_keep_nothing(adapted: Any) -> None:
    model, _, operator = adapted
    with cache_weights(model):
        made(model, operator)
        assert held(model.first) and not held(copy.deepcopy(model).first)


def test_another_tensor_in_the_place_of_one_that_is_gone_is_another() -> None:
    """Its identity, its address and its counter may all be those of the one before."""
    kept = WeightCache()
    memory = torch.zeros(3).numpy()

    def read() -> float:
        return float(kept.get("sum", [torch.from_numpy(memory)], (), lambda: float(memory.sum())))

    assert read() == 0
    memory += 1
    assert read() == 3
