"""Applying is all or nothing, removing restores everything, and the handle tells the truth."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from core_toys import (
    Attention,
    Doubling,
    SharedBases,
    Shift,
    Swap,
    Transformer,
    perceptron,
    snapshot,
    token_ids,
    transformer,
)
from torch import Tensor, nn

import peftcore
from peftcore import hookimpl
from peftcore.errors import (
    ConfigError,
    DuplicateInjection,
    PluginError,
    TargetError,
    UnknownMethod,
    UnsupportedHost,
    UnsupportedSite,
)
from peftcore.registry.plugins import registry
from peftcore.surgery import installation

ALL = ["lora", "dora", "ia3", "houlsby_adapter", "bitfit", "ln_tuning", "linear_probe"]
TOYS = [Doubling, Shift, Swap, SharedBases]


def irregular() -> Transformer:
    """A host in a state that no rule describes: some parameters frozen, some modules in eval, hooks of its own."""
    model = transformer().train()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 == 0)
    model.layers[1].eval()
    model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, args, output: None)
    model.register_forward_pre_hook(lambda module, args: None)
    return model


# apply and remove


@pytest.mark.parametrize("method", [*ALL, *TOYS], ids=lambda m: m if isinstance(m, str) else m.name)
@pytest.mark.parametrize("run", ["unused", "trained"])
def test_remove_restores_everything(method: Any, run: str) -> None:
    model = irregular()
    before = snapshot(model)
    injection = peftcore.apply(model, method, train=["classifier"])
    assert snapshot(model) != before
    if run == "trained":
        optimizer = torch.optim.AdamW(injection.parameters(), lr=0.1)
        for _ in range(2):
            model(token_ids()).square().sum().backward()
            optimizer.step()
    injection.remove()
    assert snapshot(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert peftcore.injections(model) == {}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
def test_several_leave_in_any_order(order: tuple[int, ...]) -> None:
    model = irregular()
    before = snapshot(model)
    injections = [peftcore.apply(model, name) for name in ("lora", "bitfit", "ln_tuning")]
    for index in order:
        injections[index].remove()
    assert snapshot(model) == before


@pytest.mark.parametrize("method", ALL)
def test_base_is_frozen_and_operators_train(method: str) -> None:
    model = transformer()
    own = dict(model.named_parameters())
    injection = peftcore.apply(model, method)
    assert not any(parameter.requires_grad for parameter in own.values())
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in injection.parameters()} and trained
    model(token_ids()).square().sum().backward()
    assert all(parameter.grad is None for parameter in own.values())


def test_second_injection_leaves_the_first_as_it_was() -> None:
    model = transformer()
    first = peftcore.apply(model, "lora")
    first.trainable(False)
    second = peftcore.apply(model, "ia3")
    assert not any(parameter.requires_grad for parameter in first.parameters())
    second.remove()
    assert not any(parameter.requires_grad for parameter in first.parameters())
    first.trainable(True)
    assert all(parameter.requires_grad for parameter in first.parameters())


def test_apply_returns_what_injections_lists() -> None:
    model = transformer()
    assert peftcore.injections(model) == {}
    first, second = peftcore.apply(model, "lora"), peftcore.apply(model, "lora", name="again")
    assert peftcore.injections(model) == {"lora": first, "again": second}
    assert first.model is model and first.name == "lora" and first.active and second.active


def test_users_parameter_changes_after_apply_survive_where_they_are_not_ours() -> None:
    """What the user thawed while the adapter was on stays thawed; what apply froze comes back."""
    model = transformer()
    model.norm.weight.requires_grad_(False)
    injection = peftcore.apply(model, "lora")
    model.norm.weight.requires_grad_(True)
    injection.remove()
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["with.dot", "", "."])
def test_names_that_cannot_be_used(name: str) -> None:
    model = perceptron()
    before = snapshot(model)
    with pytest.raises(DuplicateInjection, match="no dots"):
        peftcore.apply(model, "lora", target="first", name=name)
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ["train", "forward", "half", "weight", "state_dict"])
def test_names_that_modules_use_themselves_are_refused_or_harmless(name: str) -> None:
    model = perceptron()
    before = snapshot(model)
    try:
        peftcore.apply(model, "lora", target="first", name=name)
    except DuplicateInjection as error:
        assert repr(name) in str(error)
        assert snapshot(model) == before
    else:
        assert isinstance(model.get_submodule(f"peft.first.{name}"), nn.Module)


def test_name_that_is_taken() -> None:
    model = perceptron()
    peftcore.apply(model, "lora", target="first")
    before = snapshot(model)
    with pytest.raises(DuplicateInjection, match="already has"):
        peftcore.apply(model, "lora", target="second")
    assert snapshot(model) == before


def test_name_is_free_again_after_remove() -> None:
    model = perceptron()
    for _ in range(3):
        peftcore.apply(model, "lora", target="first").remove()
    assert peftcore.apply(model, "lora", target="first").name == "lora"


@pytest.mark.parametrize("names", [("a", "ab"), ("peft", "lora"), ("first", "weight_")], ids=str)
def test_names_that_contain_each_other_or_a_part_of_the_host(names: tuple[str, str]) -> None:
    model, x = perceptron(), torch.randn(2, 4)
    base = model(x)
    injections = [peftcore.apply(model, Shift, target="first", name=name) for name in names]
    injections[0].remove()
    assert list(peftcore.injections(model)) == [names[1]]
    assert not torch.allclose(model(x), base, atol=1e-3)
    injections[1].remove()
    assert torch.equal(model(x), base)


def test_names_of_sites_that_contain_each_other_do_not_collide() -> None:
    class Names(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Sequential(nn.Linear(3, 3))
            self.a__0 = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a__0(self.a(x))

    model = Names()
    before = snapshot(model)
    x = torch.randn(2, 3)
    base = model(x)
    try:
        injection = peftcore.apply(model, Shift, target=nn.Linear)
    except UnsupportedHost:
        assert snapshot(model) == before
        return
    keys = [key for key in model.state_dict() if "peft" in key]
    assert len(keys) == 2 and not torch.equal(model(x), base)
    injection.remove()
    assert snapshot(model) == before


# failures, at each stage


class Fragile(Shift.Config):
    """Options of the method that breaks."""

    method: Any = "toy_fragile"
    stage: str = "inject"
    """Where it breaks."""


class Breaks(peftcore.Method):
    """Fails where it is told to."""

    name = "toy_fragile"
    Config = Fragile
    tags = Shift.tags
    target = "attn.q"

    def inject(self, model: Any, config: Any, surgeon: Any) -> None:
        for number, site in enumerate(surgeon.sites()):
            if config.stage == "inject" and number == 1:
                raise ZeroDivisionError("inject")
            surgeon.graft(site, BreakingOperator, config)

    def trainable(self, model: Any, config: Any, injection: Any) -> None:
        super().trainable(model, config, injection)
        if config.stage == "trainable":
            raise ZeroDivisionError("trainable")

    @staticmethod
    def parameter_count(site: Any, config: Any) -> int:
        return site.numel


class BreakingOperator(peftcore.WeightOperator):
    built = 0

    def __init__(self, site: Any, config: Any) -> None:
        super().__init__(site)
        BreakingOperator.built += 1
        if config.stage == "operator" and BreakingOperator.built % 2 == 0:
            raise ZeroDivisionError("operator")
        self.shift = nn.Parameter(torch.zeros(tuple(site.weight_shape)))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.shift


def break_install(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(100))
    real = installation.attach

    def attach(*args: Any) -> Any:
        if next(calls) == 1:
            raise ZeroDivisionError("install")
        return real(*args)

    monkeypatch.setattr(installation, "attach", attach)


@pytest.mark.parametrize("adapted", [False, True], ids=["bare host", "host with another injection"])
@pytest.mark.parametrize("stage", ["inject", "operator", "install", "trainable", "hook"])
def test_failure_at_any_stage_changes_nothing(stage: str, adapted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = irregular()
    if adapted:
        peftcore.apply(model, "lora", train=["classifier"])
    before, generator = snapshot(model), torch.get_rng_state()
    output = model(token_ids())
    before = snapshot(model)
    BreakingOperator.built = 0
    holder = FailingSelect()
    if stage == "install":
        break_install(monkeypatch)
    if stage == "hook":
        registry().manager.register(holder)
    try:
        with pytest.raises(ZeroDivisionError):
            peftcore.apply(model, Breaks, stage=stage, train=["norm"])
    finally:
        if stage == "hook":
            registry().manager.unregister(holder)
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), generator)
    assert list(peftcore.injections(model)) == (["lora"] if adapted else [])
    assert torch.equal(model(token_ids()), output)
    monkeypatch.undo()
    assert peftcore.apply(model, Breaks, stage="none").name == "toy_fragile"  # nothing of the failure is in the way


class FailingSelect:
    @hookimpl
    def peftcore_select(self, model: Any) -> None:
        raise ZeroDivisionError("hook")


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (UnknownMethod, {"method": "lorra"}),
        (ConfigError, {"method": "lora", "rank": 0}),
        (ConfigError, {"method": "lora", "dtype": "int8"}),
        (TargetError, {"method": "lora", "target": "nothing"}),
        (TargetError, {"method": "lora", "train": ["nothing"]}),
        (UnsupportedSite, {"method": "lora", "target": "norm"}),
        (UnsupportedSite, {"method": Doubling, "target": "norm.bias"}),
        (UnsupportedSite, {"method": "lora", "target": "mlp"}),
        (DuplicateInjection, {"method": "lora", "name": "a.b"}),
    ],
    ids=lambda value: "" if isinstance(value, type) else str(value),
)
def test_typed_errors_change_nothing(error: type[Exception], arguments: dict[str, Any]) -> None:
    model = irregular()
    before = snapshot(model)
    for call in (peftcore.apply, peftcore.plan):
        given = {k: v for k, v in arguments.items() if call is peftcore.apply or k != "name"}
        if call is peftcore.plan and "name" in arguments:
            continue
        with pytest.raises(error):
            call(model, **given)
        assert snapshot(model) == before


def test_method_that_grafts_a_site_twice_is_told_so() -> None:
    class Twice(peftcore.Method):
        name = "toy_twice"
        Config = Shift.Config
        tags = Shift.tags
        target = "attn.q"

        def inject(self, model: Any, config: Any, surgeon: Any) -> None:
            for site in surgeon.sites() + surgeon.sites():
                surgeon.graft(site, BreakingOperator, Fragile(stage="none"))

        @staticmethod
        def parameter_count(site: Any, config: Any) -> int:
            return 0

    model = transformer()
    before = snapshot(model)
    with pytest.raises(PluginError, match="twice"):
        peftcore.apply(model, Twice)
    assert snapshot(model) == before


def test_instance_level_forward_is_refused() -> None:
    model = perceptron()
    model.first.forward = functools.partial(nn.Linear.forward, model.first)
    before = snapshot(model)
    with pytest.raises(UnsupportedSite, match="set on the instance"):
        peftcore.apply(model, "lora", target="first")
    assert snapshot(model) == before
    peftcore.apply(model, "lora", target="second")


def test_data_parallel_and_torchscript_are_refused() -> None:
    with pytest.raises(UnsupportedHost, match="DistributedDataParallel"):
        peftcore.apply(nn.DataParallel(perceptron()), "lora", target="first")
    scripted = torch.jit.trace(perceptron(), torch.randn(1, 4))
    with pytest.raises(UnsupportedHost, match="TorchScript"):
        peftcore.apply(scripted, "lora", target="first")


def test_host_with_a_scripted_part_can_be_adapted_elsewhere() -> None:
    model = perceptron()
    model.second = torch.jit.script(model.second)
    before = snapshot(model)
    with pytest.raises((TargetError, UnsupportedHost, UnsupportedSite)):
        peftcore.apply(model, "lora", target="second")
    assert snapshot(model) == before
    injection = peftcore.apply(model, "lora", target="first")
    model(torch.randn(2, 4)).sum().backward()
    injection.remove()
    assert snapshot(model)["modules"] == before["modules"]


# seeds


def test_operators_are_drawn_from_seed_and_path_and_the_global_generator_does_not_move() -> None:
    before = torch.get_rng_state()
    one = peftcore.apply(transformer(), "lora", seed=5)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    two = peftcore.apply(transformer(), "lora", seed=5, target=["attn.v", "attn.k", "attn.q"])
    torch.set_rng_state(before)
    other = peftcore.apply(transformer(), "lora", seed=6)
    assert not torch.equal(state, before)
    for path, operator in one.operators.items():
        assert torch.equal(operator.A, two.operators[path].A)
        assert not torch.equal(operator.A, other.operators[path].A)
    assert not torch.equal(one.operators["layers.0.self_attn.q_proj"].A, one.operators["layers.1.self_attn.q_proj"].A)


def test_global_generator_does_not_move() -> None:
    torch.manual_seed(3)
    model = transformer()
    torch.manual_seed(4)
    before = torch.get_rng_state()
    for method in ALL:
        peftcore.apply(model, method)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_seed_torchs_own_decides() -> None:
    drawn = []
    for seed in (1, 1, 2):
        model = perceptron()
        torch.manual_seed(seed)
        drawn.append(peftcore.apply(model, "lora", target="first").operators["first"].A)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


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


def test_effects_on_one_bias_compose_in_order() -> None:
    """Gains that scale a bias, then a replacement of it: the later one has the last word, merged or not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    gains = peftcore.apply(model, "ia3", target=["0"])
    biases = peftcore.apply(model, "bitfit", target=["0"])
    with torch.no_grad():
        for parameter in (*gains.parameters(), *biases.parameters()):
            parameter.add_(torch.randn_like(parameter))
    gain, bias = (next(each.parameters()).detach() for each in (gains, biases))
    expected = model[1](gain * (x @ model[0].weight.T) + bias)
    torch.testing.assert_close(model(x), expected)
    gains.merge()
    biases.merge()
    torch.testing.assert_close(model(x), expected)


def test_tensor_parallel_weights_are_refused(tmp_path: Path) -> None:
    distributed = pytest.importorskip("torch.distributed")
    from torch.distributed.tensor import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        parallelize_module(model, init_device_mesh("cpu", (1,)), {"0": ColwiseParallel()})
        before = [type(module) for module in model.modules()]
        with pytest.raises(UnsupportedHost, match="tensor-parallel"):
            peftcore.apply(model, "lora", target=["1"])
        assert [type(module) for module in model.modules()] == before
    finally:
        distributed.destroy_process_group()


def test_building_many_operators_shows_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []

    class Bar:
        def __init__(self, **options: Any) -> None:
            self.total, self.done, self.open = 0, 0, True
            self.delay = options["delay"]
            shown.append(self)

        def update(self) -> None:
            self.done += 1

        def close(self) -> None:
            self.open = False

    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(5)))
    peftcore.plan(model, "lora", target=nn.Linear)
    assert not shown
    injection = peftcore.apply(model, "lora", target=nn.Linear)
    (bar,) = shown
    assert (bar.total, bar.done, bar.open, bar.delay > 0) == (5, 5, False, True)
    copy.deepcopy(injection.model)
