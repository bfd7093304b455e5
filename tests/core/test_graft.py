"""A grafted site keeps its identity, and what its operators make of it never outlives its use."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from core_toys import (
    Doubling,
    DoublingOperator,
    Shift,
    ShiftOperator,
    Swap,
    TiedLanguageModel,
    perceptron,
    snapshot,
    stir,
    token_ids,
    transformer,
)
from torch import Tensor, nn

import peftcore
from peftcore.errors import UnsupportedHost


def run_without_gradients(model: nn.Module, *inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(*inputs)


# identity


@pytest.mark.parametrize("method", [Doubling, Shift, Swap], ids=lambda method: method.name)
def test_identity_of_the_site(method: Any) -> None:
    model = perceptron()
    plain, signature, keys = type(model.first), inspect.signature(model.first.forward), list(model.first.state_dict())
    parameters = [(name, id(value)) for name, value in model.first.named_parameters()]
    injection = peftcore.apply(model, method, target="first")
    site = model.first
    assert (
        type(site).__name__ == "Linear"
        and type(site).__qualname__ == "Linear"
        and type(site).__module__ == plain.__module__
    )
    assert isinstance(site, nn.Linear)
    assert inspect.signature(site.forward) == signature and not hasattr(type(site).forward, "__wrapped__")
    assert list(site.state_dict()) == keys
    assert [(name, id(value)) for name, value in site.named_parameters()] == parameters
    assert not list(site.children()) and site.in_features == 4
    assert repr(site) == "Linear(in_features=4, out_features=6, bias=True)"
    injection.remove()
    assert type(model.first) is plain


def test_order_of_the_hosts_own_keys_and_parameters_stays() -> None:
    model = transformer()
    keys, parameters = list(model.state_dict()), [name for name, _ in model.named_parameters()]
    peftcore.apply(model, "lora", train=["classifier"])
    assert [key for key in model.state_dict() if ".peft." not in key and not key.startswith("peft.")] == keys
    assert [n for n, _ in model.named_parameters() if ".peft." not in n and not n.startswith("peft.")] == parameters


def test_one_class_stands_for_each_base_class() -> None:
    model = transformer()
    peftcore.apply(model, "lora")
    other = perceptron()
    peftcore.apply(other, Shift, target="first")
    classes = {type(layer.self_attn.q_proj) for layer in model.layers} | {type(other.first)}
    assert len(classes) == 1
    assert type(other.second) is nn.Linear


def test_operators_live_one_level_up() -> None:
    model = transformer()
    peftcore.apply(model, "lora")
    assert model.get_submodule("layers.0.self_attn.peft.q_proj.lora").A.shape == (8, 8)
    assert [name for name, _ in model.layers[0].self_attn.named_children()][-1] == "peft"


def test_operators_of_the_hosts_own_children_live_on_the_host() -> None:
    model = perceptron()
    peftcore.apply(model, "lora", target="first")
    assert "peft.first.lora.A" in model.state_dict()


class Nested(nn.Module):
    """Containers between a site and the module that owns it."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 4))])
        self.named = nn.ModuleDict({"a": nn.Linear(4, 4)})

    def forward(self, x: Tensor) -> Tensor:
        for part in self.stack:
            x = part(x)
        return self.named["a"](x)


def test_operators_never_live_in_containers() -> None:
    model = Nested()
    injection = peftcore.apply(model, Shift, target=nn.Linear)
    assert [name for name, _ in model.named_children()] == ["stack", "named", "peft"]
    assert set(model.peft._modules) == {"stack__0__0", "stack__1__0", "named__a"}
    for container in (model.stack, model.stack[0], model.stack[1], model.named):
        assert "peft" not in container._modules
    x = torch.randn(3, 4)
    moved = model(x)
    injection.remove()
    assert not torch.allclose(moved, model(x), atol=1e-3)


def test_sequential_host_is_still_a_sequence() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(3, 4)
    base = model(x)
    before = snapshot(model)
    injection = peftcore.apply(model, "lora", target=nn.Linear)
    assert len(model) == 3 and [type(part).__name__ for part in model] == ["Linear", "ReLU", "Linear"]
    assert torch.allclose(model(x), base, atol=1e-6)
    stir(injection)
    assert not torch.allclose(model(x), base, atol=1e-3)
    injection.remove()
    assert snapshot(model) == before and torch.equal(model(x), base)


@pytest.mark.parametrize("method", [Shift, "lora", "dora", "bitfit"], ids=str)
def test_host_may_be_one_bare_layer(method: Any) -> None:
    model = nn.Linear(4, 6)
    x = torch.randn(3, 4)
    before, base = snapshot(model), model(x)
    injection = peftcore.apply(model, method, target=nn.Linear)
    stir(injection)
    assert isinstance(model, nn.Linear) and list(model.state_dict())[:2] == ["weight", "bias"]
    assert all(key.startswith("peft.") for key in list(model.state_dict())[2:])
    assert not torch.allclose(model(x), base, atol=1e-3)
    injection.remove()
    assert snapshot(model) == before and torch.equal(model(x), base)


def test_container_of_nothing_but_containers_around_it_is_refused() -> None:
    with pytest.raises(UnsupportedHost, match="container"):
        peftcore.apply(nn.Sequential(nn.Sequential()), StandOnRoot)


class StandOnRoot(peftcore.Method):
    """Acts on what the host itself returns."""

    name = "toy_root"
    Config = Doubling.Config
    tags = Doubling.tags
    target = ""

    def inject(self, model: Any, config: Any, surgeon: Any) -> None:
        surgeon.graft(surgeon.resolver.site("", "weight", "mlp.output"), DoublingOperator, config)

    @staticmethod
    def parameter_count(site: Any, config: Any) -> int:
        return 1


class OwnPeft(nn.Module):
    """A host that uses the name `peft` for something of its own."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        if isinstance(value, nn.Parameter):
            self.register_parameter("peft", value)
        else:
            self.peft = value

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class WithMethod(OwnPeft):
    """A host whose class has a method of that name."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.inner = nn.Linear(4, 4)

    def peft(self) -> str:
        return "mine"


@pytest.mark.parametrize(
    "make",
    [
        lambda: OwnPeft("text"),
        lambda: OwnPeft(nn.Linear(2, 2)),
        lambda: OwnPeft(nn.Parameter(torch.ones(2))),
        lambda: OwnPeft(None),
        WithMethod,
    ],
    ids=["attribute", "module", "parameter", "none", "method of the class"],
)
def test_host_with_a_peft_of_its_own_is_refused_unchanged(make: Callable[[], nn.Module]) -> None:
    model = make()
    before = snapshot(model)
    with pytest.raises(UnsupportedHost, match="'peft'"):
        peftcore.apply(model, "lora", target="inner")
    assert snapshot(model) == before and peftcore.injections(model) == {}


def test_lazy_host_is_refused_unchanged_until_it_has_run() -> None:
    model, x = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(2, 5)
    for target in ("0", "2", nn.Linear):
        with pytest.raises(UnsupportedHost, match="run the host once"):
            peftcore.apply(model, "lora", target=target)
    assert peftcore.injections(model) == {} and all(each.requires_grad for each in model.parameters())
    model(x)
    assert len(peftcore.apply(model, "lora", target=nn.Linear).sites) == 2


# order and composition


class Trace(DoublingOperator):
    """Writes down when it enters and leaves."""

    log: list[str]

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.log.append(f"into {self.label}")
        output = call(*args, **kwargs)
        self.log.append(f"out of {self.label}")
        return output


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


# ties, parametrizations, calls


def test_tied_modules_are_one_site() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    model["b"] = model["a"]
    injection = peftcore.apply(model, Shift, target=nn.Linear)
    assert list(injection.operators) == ["a"]
    x = torch.randn(2, 4)
    assert torch.equal(model["a"](x), model["b"](x))


def test_tied_weights_stay_tied() -> None:
    model = TiedLanguageModel()
    injection = peftcore.apply(model, "lora", target="inner")
    assert model.lm_head.weight is model.embed_tokens.weight
    injection.remove()
    assert model.lm_head.weight is model.embed_tokens.weight


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
    monkeypatch.setattr("peftcore.forward.run.view", None)
    y = run_without_gradients(model.first, x)
    injection.merge()
    torch.testing.assert_close(y, model.first(x))


def test_hooks_of_the_user_on_a_site_still_run() -> None:
    model, x = perceptron(), torch.randn(3, 4, requires_grad=True)
    seen: list[str] = []
    model.first.register_forward_pre_hook(lambda module, args: seen.append("before"))
    model.first.register_forward_hook(lambda module, args, output: seen.append("after"))
    injection = peftcore.apply(model, Shift, target="first")
    model.first.register_forward_hook(lambda module, args, output: seen.append("later"))
    model.first.register_full_backward_hook(lambda module, inputs, outputs: seen.append("backward"))
    output = model(x)
    assert seen == ["before", "after", "later"]
    output.sum().backward()
    assert seen[-1] == "backward"
    injection.remove()
    seen.clear()
    model(x)
    assert seen == ["before", "after", "later"]


def test_output_hook_sees_what_the_operators_made() -> None:
    model, x = perceptron(), torch.randn(3, 4)
    caught: list[Tensor] = []
    model.first.register_forward_hook(lambda module, args, output: caught.append(output))
    expected = 2 * model.first(x)
    peftcore.apply(model, Doubling, target="first")
    model(x)
    assert torch.allclose(caught[-1], expected)


def test_site_moved_into_another_model_without_its_host_runs_bare() -> None:
    """A missing slot is tolerated: the class alone is the base class."""
    model = perceptron()
    peftcore.apply(model, Shift, target="first")
    lone = object.__new__(type(model.first))
    lone.__dict__.update({key: value for key, value in model.first.__dict__.items() if key != "_peftcore_slot"})
    x = torch.randn(2, 4)
    assert torch.equal(lone(x), nn.functional.linear(x, model.first.weight, model.first.bias))


def test_grafted_transformer_equals_its_base_when_fresh() -> None:
    model = transformer()
    base = model(token_ids())
    peftcore.apply(model, "dora", target="all-linear")
    assert torch.allclose(model(token_ids()), base, atol=1e-5)


def test_an_input_changed_for_some_rows_of_a_fused_projection_leaves_the_others() -> None:
    """Queries, keys and values in one matrix: what scales the inputs of queries does nothing to keys and values."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, num_heads=2, depth=1, num_classes=3)
    qkv = model.eval().double().blocks[0].attn.qkv
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    before = qkv(x)
    injection = peftcore.apply(model, "ia3", target="attn.q", scale_inputs=["attn.q"], dtype=torch.float64)
    gain = next(injection.parameters())
    with torch.no_grad():
        gain.normal_(1, 0.1)
        after = qkv(x)
        torch.testing.assert_close(after[..., 24:], before[..., 24:], rtol=0, atol=1e-12)
        torch.testing.assert_close(
            after[..., :24], torch.nn.functional.linear(x * gain, qkv.weight, qkv.bias)[..., :24]
        )
        injection.merge()
        torch.testing.assert_close(qkv(x), after, rtol=0, atol=1e-12)
