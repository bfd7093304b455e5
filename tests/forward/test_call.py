"""What a grafted module computes: order, composition, calls of any kind, and nothing left behind by errors."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from core_toys import (
    Attention,
    Doubling,
    DoublingOperator,
    Shift,
    ShiftOperator,
    perceptron,
    run_without_gradients,
    snapshot,
    stir,
    token_ids,
    transformer,
)
from torch import Tensor, nn

import peftcore
from peftcore.forward import call


# order and composition
class Trace(DoublingOperator):
    """Writes down when it enters and leaves."""

    log: list[str]

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.log.append(f"into {self.label}")
        output = call(*args, **kwargs)
        self.log.append(f"out of {self.label}")
        return output


class TwiceAsMuch(peftcore.author.InputOperator):
    """Doubles what the module is given, and tells it something more."""

    def __init__(self, site: peftcore.author.Site) -> None:
        super().__init__(site)
        self.unused = nn.Parameter(torch.zeros(()))

    def arguments(self, given: dict[str, Any], mine: Callable[[Tensor], Tensor | None]) -> dict[str, Any]:
        x = given["x"]
        found = mine(x)
        rows = torch.ones(len(x), 1) if found is None else found[:, None].to(x)
        return {**given, "x": x + rows * x, "plus": rows}


class Minus(peftcore.author.Operator):
    """Takes what the module is given by position, as operators around modules do."""

    def __init__(self, site: peftcore.author.Site) -> None:
        super().__init__(site)
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, call: Callable[..., Tensor], tokens: Tensor, *others: Any, **kwargs: Any) -> Tensor:
        return -call(tokens, *others, **kwargs)


class Affine(nn.Linear):
    def forward(self, x: Tensor, times: float = 1.0, plus: float | Tensor = 0.0) -> Tensor:
        return super().forward(x) * times + plus


class Given(peftcore.author.Method):
    """One of the two operators."""

    name, target = "toy_given", ("first",)
    tags = peftcore.author.Tags(category="additive", paper="none", identity_at_init=False)

    class Config(peftcore.author.MethodConfig):
        method: Literal["toy_given"] = "toy_given"
        turned: bool = False

    def inject(self, model: nn.Module, config: Any, surgeon: Any) -> None:
        for site in surgeon.sites():
            surgeon.graft(replace(site, form="given"), Minus if config.turned else TwiceAsMuch)

    @staticmethod
    def parameter_count(site: Any, config: Any) -> int:
        return 1


@pytest.mark.parametrize("order", [("given", "turned"), ("turned", "given")])
def test_arguments_by_position_stay_so_when_an_operator_changes_them(order: tuple[str, str]) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"first": Affine(4, 4)})
    layer, x = model["first"], torch.randn(3, 4)
    plain, doubled = layer(x, 3.0), layer(2 * x, 3.0) + 1
    for name in order:
        peftcore.apply(model, Given, name=name, target="first", turned=name == "turned")
    assert torch.equal(layer(x, 3.0), -doubled)
    assert torch.equal(layer(x, times=3.0), -doubled)
    peftcore.activate(model, "given")
    assert torch.equal(layer(x, 3.0), doubled)
    peftcore.activate(model)
    assert torch.equal(layer(x, 3.0), plain)
    peftcore.route(model, ["given", None, "turned"])
    assert torch.equal(model["first"](x, 3.0), torch.stack([doubled[0], plain[1], -plain[2]]))


def test_first_applied_is_the_innermost() -> None:
    model = perceptron()
    log: list[str] = []
    for label in ("inner", "outer"):
        injection = peftcore.apply(model, Doubling, name=label, target="first")
        operator = injection.operators["first"]
        operator.__class__ = Trace
        operator.log, operator.label = log, label
    model(torch.randn(2, 4))
    assert log == ["into outer", "into inner", "out of inner", "out of outer"]


@pytest.mark.parametrize(
    "order", [("lora", "dora"), ("dora", "lora"), ("ia3", "dora"), ("lora", "ia3"), ("bitfit", "ia3")], ids=str
)
def test_several_active_act_as_merging_one_after_the_other(order: tuple[str, str]) -> None:
    model, x = perceptron(), torch.randn(5, 4)
    injections = [peftcore.apply(model, name, target="first" if name != "bitfit" else "*") for name in order]
    for seed, injection in enumerate(injections):
        stir(injection, 0.3, seed)
    both = model(x)
    for injection in injections:
        injection.merge()
    merged = model(x)
    for injection in reversed(injections):
        injection.unmerge()
    assert torch.allclose(both, merged, atol=1e-5)
    for injection in injections:
        with injection.disabled():
            assert not torch.allclose(model(x), both, atol=1e-3)


def test_order_of_activation_does_not_change_the_order_of_action() -> None:
    model, x = perceptron(), torch.randn(5, 4)
    peftcore.apply(model, Shift, name="one", target="first")
    stir(peftcore.apply(model, "ia3", name="two", target="first"), 0.3)
    both = model(x)
    peftcore.activate(model, "two", "one")
    assert torch.equal(model(x), both)


# exceptions
class Failing(DoublingOperator):
    fail = True

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.fail:
            raise ZeroDivisionError("in the operator")
        return super().forward(call, *args, **kwargs)


class FailingWeight(ShiftOperator):
    fail = True

    def forward(self, weight: Tensor) -> Tensor:
        if self.fail:
            raise ZeroDivisionError("in the operator")
        return super().forward(weight)


@pytest.mark.parametrize(("method", "failing"), [(Doubling, Failing), (Shift, FailingWeight)], ids=["onion", "weight"])
@pytest.mark.parametrize("gradients", [True, False])
def test_exception_in_an_operator_leaves_nothing_behind(method: Any, failing: Any, gradients: bool) -> None:
    model, x = perceptron(), torch.randn(3, 4)
    injection = peftcore.apply(model, method, target="first")
    expected = model(x)
    operator = injection.operators["first"]
    operator.__class__ = failing
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), torch.set_grad_enabled(gradients):
        model(x)
    assert snapshot(model) == before
    assert not torch.is_autocast_enabled("cpu")
    operator.fail = False
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_parametrized_weight_below(norm: Callable[[nn.Module], nn.Module], method: str) -> None:
    torch.manual_seed(0)
    model, plain = perceptron(), perceptron()
    norm(model.first)
    model.eval()
    with torch.no_grad():
        plain.first.weight.copy_(model.first.weight)
        plain.first.bias.copy_(model.first.bias)
    x = torch.randn(5, 4)
    before = snapshot(model)
    injections = [peftcore.apply(host, method, target="first", seed=0) for host in (model, plain)]
    for injection in injections:
        stir(injection)
    assert torch.allclose(model(x), plain(x), atol=1e-5)
    assert torch.allclose(run_without_gradients(model, x), plain(x), atol=1e-5)
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in injections[0].parameters())
    injections[0].remove()
    assert snapshot(model)["modules"] == before["modules"] and snapshot(model)["bits"] == before["bits"]


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_parametrized_weight_above(norm: Callable[[nn.Module], nn.Module]) -> None:
    model, x = perceptron(), torch.randn(5, 4)
    injection = peftcore.apply(model, "dora", target="first")
    stir(injection)
    norm(model.first)
    model.eval()
    expected = nn.functional.linear(x, injection.operators["first"].merged(model.first.weight), model.first.bias)
    assert torch.allclose(model.second(torch.relu(expected)), model(x), atol=1e-5)
    nn.utils.parametrize.remove_parametrizations(model.first, "weight")
    assert isinstance(model.first, nn.Linear)
    model(x)
    injection.check()


class Twice(nn.Module):
    """Calls one module two times, and itself once."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)

    def forward(self, x: Tensor, *, depth: int = 1) -> Tensor:
        x = self.shared(self.shared(x))
        return self(x, depth=depth - 1) if depth else x


@pytest.mark.parametrize("method", [Doubling, Shift, "lora", "dora"], ids=str)
def test_shared_module_called_twice_in_a_recursion(method: Any) -> None:
    model, x = Twice(), torch.randn(3, 4)
    injection = peftcore.apply(model, method, target="shared")
    stir(injection)
    expected = x
    for _ in range(4):
        expected = model.shared(expected)
    assert torch.equal(model(x), expected)
    assert torch.allclose(run_without_gradients(model, x), expected, atol=1e-6)
    model(x).sum().backward()
    got = [parameter.grad.clone() for parameter in injection.parameters()]
    model.zero_grad()
    expected.sum().backward()
    assert all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-5)
        for a, b in zip(got, (p.grad for p in injection.parameters()), strict=True)
    )


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, *, x: Tensor) -> Tensor:
        return self.inner(input=x)


@pytest.mark.parametrize("method", [Doubling, Shift, "dora", "bitfit", "houlsby_adapter"], ids=str)
def test_site_called_with_keywords_only(method: Any) -> None:
    model, x = Keywords(), torch.randn(3, 4)
    base = model(x=x)
    host = peftcore.plan(model, Shift, target="inner").host.override({"inner": "mlp.down"})
    injection = peftcore.apply(
        model, method, host=host, **({} if method in ("houlsby_adapter",) else {"target": "inner"})
    )
    stir(injection)
    assert not torch.allclose(model(x=x), base, atol=1e-3)


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_operators_of_one_input_take_it_under_any_name(method: str) -> None:
    """`linear(input=x)` is legal for every linear layer; an adapter must not make it an error."""
    model, x = Keywords(), torch.randn(3, 4)
    injection = peftcore.apply(model, method, target="inner")
    stir(injection, 0.3)
    by_name = model(x=x)
    assert torch.equal(by_name, model.inner(x))


def test_a_linear_layer_multiplies_with_its_effective_weight_without_a_view(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making one takes longer than a token's product."""
    model, x = perceptron(), torch.randn(3, 4)
    injection = peftcore.apply(model, Shift, target="first")
    stir(injection)
    monkeypatch.setattr(call, "view", None)
    y = run_without_gradients(model.first, x)
    injection.merge()
    torch.testing.assert_close(y, model.first(x))


def test_output_hook_sees_what_the_operators_made() -> None:
    model, x = perceptron(), torch.randn(3, 4)
    caught: list[Tensor] = []
    model.first.register_forward_hook(lambda module, args, output: caught.append(output))
    expected = 2 * model.first(x)
    peftcore.apply(model, Doubling, target="first")
    model(x)
    assert torch.allclose(caught[-1], expected)


def test_grafted_transformer_equals_its_base_when_fresh() -> None:
    model = transformer()
    base = model(token_ids())
    peftcore.apply(model, "dora", target="all-linear")
    assert torch.allclose(model(token_ids()), base, atol=1e-5)


# sites of other kinds
def test_attention_with_keyword_only_forward_can_be_a_site() -> None:
    model = transformer()
    assert isinstance(model.layers[0].self_attn, Attention)
    injection = peftcore.apply(model, Doubling, target="attn.output")
    base = model(token_ids())
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.fill_(0.0)
    assert not torch.allclose(model(token_ids()), base, atol=1e-3)
