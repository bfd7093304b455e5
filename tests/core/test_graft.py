"""A grafted site keeps its identity, and what its operators make of it never outlives its use."""

import inspect
import pickle
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
from peftcore.graft import slot_of


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


# the view


class Reader(nn.Module):
    """Reads a child's weight and never calls the child."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 6, bias=False)
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(id(self.qkv.weight))
        return nn.functional.linear(x, self.qkv.weight)


class OnNestedTensor(peftcore.Method):
    """Acts on a child's tensor through the module that reads it."""

    name = "toy_nested"
    Config = Shift.Config
    tags = Shift.tags
    target = ""

    def inject(self, model: Any, config: Any, surgeon: Any) -> None:
        surgeon.graft(surgeon.resolver.site("reader", "qkv.weight"), ShiftOperator, config)

    @staticmethod
    def parameter_count(site: Any, config: Any) -> int:
        return site.numel


class Options(Shift.Config):
    """Options of the method above."""

    method: Any = "toy_nested"


def test_nested_path_reaches_a_weight_that_is_read() -> None:
    model = nn.ModuleDict({"reader": Reader()})
    x = torch.randn(3, 4)
    base, weight, child = model["reader"](x), model["reader"].qkv.weight, model["reader"].qkv
    injection = peftcore.apply(model, OnNestedTensor)
    assert list(injection.operators) == ["reader.qkv.weight"]
    moved = model["reader"](x)
    assert torch.allclose(moved, nn.functional.linear(x, weight + 1), atol=1e-6)
    assert model["reader"].qkv is child and child.weight is weight  # the host itself never sees the effective weight
    assert type(child) is nn.Linear
    injection.remove()
    assert torch.equal(model["reader"](x), base)


def test_attributes_that_forward_sets_reach_the_site() -> None:
    """The view shares lists and other objects; that is what modules with state of their own rely on."""
    model = nn.ModuleDict({"reader": Reader()})
    peftcore.apply(model, OnNestedTensor)
    model["reader"](torch.randn(3, 4))
    assert len(model["reader"].seen) == 1


class Keeper(nn.Module):
    """Keeps what it made of its table, in evaluation, as LeViT does with its biases."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 4))
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if "rows" not in self.kept:
            self.kept["rows"] = self.table[:, [2, 0, 1]]
        return x @ self.kept["rows"].T


@pytest.mark.parametrize("fresh", [True, False])
def test_what_a_module_keeps_of_its_tensors_is_not_taken_for_what_acts(fresh: bool) -> None:
    model, x = nn.ModuleDict({"keeper": Keeper()}), torch.randn(2, 3)
    base = x @ model["keeper"].table[:, [2, 0, 1]].T
    if not fresh:
        model["keeper"](x)
    injection = peftcore.apply(model, Shift, target="keeper.table")
    moved = model["keeper"](x)
    assert torch.allclose(moved, base + x.sum(-1, keepdim=True), atol=1e-6)
    moved.sum().backward()  # where the module runs again
    injection.remove()
    assert torch.equal(model["keeper"](x), base)


class Frozen(nn.Module):
    """A norm as detection models have it: buffers and no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(4).bfloat16())
        self.register_buffer("bias", torch.randn(4).bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.get_buffer("weight") + self.get_buffer("bias")


def test_a_module_without_parameters() -> None:
    model, x = perceptron().bfloat16(), torch.randn(2, 4).bfloat16()
    model.first, model.second = Frozen(), nn.Linear(4, 3).bfloat16()
    base, norm = model(x), model.first(x)
    injection = peftcore.apply(model, Shift, target="first")
    moved = model(x)
    assert moved.dtype == torch.bfloat16 and torch.allclose(model.first(x), norm + x, atol=0.05)
    injection.merge()
    assert torch.equal(model(x), moved)
    injection.remove()
    assert torch.equal(model(x), base)


def test_effective_bias_of_a_missing_slot() -> None:
    model = perceptron()
    model.first = nn.Linear(4, 6, bias=False)
    before, x = snapshot(model), torch.randn(3, 4)
    injection = peftcore.apply(model, "bitfit", target="first", add_missing_bias=True)
    (site,) = injection.sites
    assert site.path == "first.bias" and model.first.bias is None
    base = nn.functional.linear(x, model.first.weight)
    assert torch.equal(model.first(x), base)
    stir(injection, 1.0)
    moved = base + injection.operators["first.bias"].value
    assert torch.allclose(model.first(x), moved, atol=1e-6)
    injection.merge()
    assert model.first.bias is not None and torch.allclose(model.first(x), moved, atol=1e-6)
    injection.unmerge()
    assert model.first.bias is None and list(model.first.state_dict()) == ["weight"]
    injection.remove()
    assert snapshot(model) == before


# stances: modules of torch that must be held


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.bn(self.conv(x))).mean((2, 3)))


def test_statistics_of_a_frozen_base_stay() -> None:
    model = Normed().train()
    injection = peftcore.apply(model, "lora", target="head")  # nowhere near the norm
    before = {name: value.clone() for name, value in model.bn.named_buffers()}
    for _ in range(2):
        model(torch.randn(4, 3, 6, 6)).sum().backward()
    assert all(torch.equal(before[name], value) for name, value in model.bn.named_buffers())
    assert model.bn.training, "the user's mode is the user's"
    injection.remove()
    model(torch.randn(4, 3, 6, 6))
    assert not all(torch.equal(before[name], value) for name, value in model.bn.named_buffers())


def test_statistics_stay_while_every_injection_is_disabled() -> None:
    model = Normed().train()
    injection = peftcore.apply(model, "lora", target="head")
    before = model.bn.running_mean.clone()
    with injection.disabled():
        model(torch.randn(4, 3, 6, 6))
    assert torch.equal(model.bn.running_mean, before)


def test_batch_norm_without_statistics_still_uses_the_batch() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False))
    x = torch.randn(6, 4)
    base = model(x)
    peftcore.apply(model, "lora", target="0")
    assert torch.allclose(model(x), base, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("method", ["lora", "ia3", "bitfit", "houlsby_adapter", "ln_tuning", "dora"])
def test_fused_path_of_the_encoder_does_not_pass_adapters_by(method: str, mask: bool) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if mask else None
    base = run_without_gradients(lambda: model(x, src_key_padding_mask=padding))
    injection = peftcore.apply(model, method)
    stir(injection, 0.3)
    with_gradients = model(x, src_key_padding_mask=padding)
    without = run_without_gradients(lambda: model(x, src_key_padding_mask=padding))
    real = ~padding if mask else torch.ones(2, 5, dtype=torch.bool)
    assert torch.allclose(with_gradients[real], without[real], atol=1e-5)
    assert (without[real] - base[real]).abs().max() > 1e-2
    with injection.disabled():
        assert torch.allclose(
            run_without_gradients(lambda: model(x, src_key_padding_mask=padding))[real], base[real], atol=1e-6
        )
    injection.remove()
    assert torch.equal(run_without_gradients(lambda: model(x, src_key_padding_mask=padding))[real], base[real])


# the effective weight in evaluation


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


def test_evaluation_builds_the_weight_once(counted: Any) -> None:
    assert [built(counted) for _ in range(4)] == [1, 0, 0, 0]


def test_kept_weight_follows_the_operator(counted: Any) -> None:
    model, _, operator = counted
    built(counted)
    first = run_without_gradients(model, torch.ones(1, 4))
    with torch.no_grad():
        operator.shift.add_(1)
    assert [built(counted), built(counted)] == [1, 0]
    assert not torch.equal(run_without_gradients(model, torch.ones(1, 4)), first)


def test_kept_weight_follows_the_base(counted: Any) -> None:
    model, _, _ = counted
    built(counted)
    with torch.no_grad():
        model.first.weight.mul_(2)
    assert [built(counted), built(counted)] == [1, 0]


def test_kept_weight_follows_a_state_dict_and_a_new_parameter(counted: Any) -> None:
    model, _, _ = counted
    built(counted)
    state = {key: value + 1 for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    assert built(counted) == 1
    model.first.weight = nn.Parameter(torch.zeros(6, 4), requires_grad=False)
    assert built(counted) == 1


def test_kept_weight_follows_optimizer_steps(counted: Any) -> None:
    model, injection, _ = counted
    for fused in (False, True):
        optimizer = torch.optim.SGD(injection.parameters(), lr=0.1, fused=fused)
        before = run_without_gradients(model, torch.ones(1, 4))
        model.zero_grad()
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        assert not torch.equal(run_without_gradients(model, torch.ones(1, 4)), before)


def test_forward_with_gradients_drops_what_is_kept(counted: Any) -> None:
    model, _, _ = counted
    built(counted)
    assert slot_of(model.first).kept is not None
    model(torch.ones(1, 4))
    assert slot_of(model.first).kept is None


def test_nothing_is_kept_in_training_mode(counted: Any) -> None:
    model, _, _ = counted
    model.train()
    assert [built(counted), built(counted)] == [1, 1]
    assert slot_of(model.first).kept is None


def test_leaving_for_training_mode_frees_what_is_kept(counted: Any) -> None:
    """A long training phase must not hold a second copy of every weight from the evaluation before."""
    model, _, _ = counted
    built(counted)
    model.train()
    model(torch.ones(1, 4)).sum().backward()
    assert slot_of(model.first).kept is None


def test_switching_injections_rebuilds(counted: Any) -> None:
    model, injection, _ = counted
    adapted = run_without_gradients(model, torch.ones(1, 4))
    with injection.disabled():
        bare = run_without_gradients(model, torch.ones(1, 4))
    assert not torch.equal(adapted, bare)
    assert torch.equal(run_without_gradients(model, torch.ones(1, 4)), adapted)


def test_kept_weights_are_not_pickled(counted: Any) -> None:
    model, injection, _ = counted
    injection.operators["first"].__class__ = ShiftOperator
    model(torch.ones(1, 4))  # the witness has seen enough and goes
    small = len(pickle.dumps(model))
    run_without_gradients(model, torch.ones(1, 4))
    assert slot_of(model.first).kept is not None
    assert len(pickle.dumps(model)) == small
    assert slot_of(pickle.loads(pickle.dumps(model)).first).kept is None


def test_inference_mode_and_no_grad_agree(counted: Any) -> None:
    model, _, _ = counted
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
