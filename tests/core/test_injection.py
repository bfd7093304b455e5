"""Applying is all or nothing, removing restores everything, and the handle tells the truth."""

import copy
import functools
import threading
from collections.abc import Callable
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
    TiedLanguageModel,
    Transformer,
    perceptron,
    snapshot,
    stir,
    token_ids,
    transformer,
)
from torch import Tensor, nn

import peftcore
from peftcore import hookimpl, installation
from peftcore.errors import (
    ConfigError,
    DuplicateInjection,
    InactiveSite,
    PluginError,
    TargetError,
    UnknownInjection,
    UnknownMethod,
    UnsupportedHost,
    UnsupportedSite,
)
from peftcore.plugins import registry
from peftcore.witness import Witness

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


# heads that train along


def test_trained_head_is_a_replacement_saved_with_the_injection() -> None:
    model, ids = transformer(), token_ids()
    base, weight = model(ids), model.classifier.weight.detach().clone()
    injection = peftcore.apply(model, "lora", train=["classifier"])
    assert {"classifier.value", "classifier.bias.value"} <= set(injection.state_dict())
    assert torch.equal(model(ids), base)
    optimizer = torch.optim.SGD(injection.parameters(), lr=0.5)
    model(ids).square().sum().backward()
    optimizer.step()
    head = injection.operators["classifier"].value
    assert not torch.equal(head, weight) and torch.equal(model.classifier.weight, weight)
    assert not torch.allclose(model(ids), base, atol=1e-2)
    with injection.disabled():
        assert torch.equal(model(ids), base)


@pytest.mark.parametrize("train", ["classifier", ("classifier",), ["classifier"], ["*classifier"], ["head"]], ids=str)
def test_spellings_of_train(train: Any) -> None:
    injection = peftcore.apply(transformer(), "lora", train=train)
    assert {path for path in injection.operators if "attn" not in path} == {"classifier", "classifier.bias"}


def test_train_names_single_parameters_and_whole_parts() -> None:
    injection = peftcore.apply(transformer(), "lora", train=["classifier.bias", "layers.1.mlp"])
    extra = [path for path in injection.operators if "attn." not in path]
    assert extra == [
        "classifier.bias",
        "layers.1.mlp.up_proj",
        "layers.1.mlp.up_proj.bias",
        "layers.1.mlp.down_proj",
        "layers.1.mlp.down_proj.bias",
    ]


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ("classifier.weight", ["classifier"]),
        ("*.mlp_norm.bias", ["layers.0.mlp_norm.bias", "layers.1.mlp_norm.bias"]),
        ("layers.0.mlp_norm", ["layers.0.mlp_norm", "layers.0.mlp_norm.bias"]),
        ("norm.final", ["norm", "norm.bias"]),
    ],
)
def test_train_trains_what_it_names_and_no_more(train: str, expected: list[str]) -> None:
    injection = peftcore.apply(transformer(), "lora", train=train)
    assert [path for path in injection.operators if "attn." not in path] == expected


def test_exclude_does_not_reach_what_train_names() -> None:
    model = nn.ModuleDict({"inner": transformer()})
    injection = peftcore.apply(
        model, "lora", target=nn.Linear, exclude=["classifier", "layers.1"], train=["classifier"]
    )
    assert {path for path in injection.operators if "layers" not in path} == {
        "inner.classifier",
        "inner.classifier.bias",
    }


def test_tied_weight_has_one_value_for_all_its_holders() -> None:
    model, ids = TiedLanguageModel(), token_ids()
    base = model(ids)
    injection = peftcore.apply(model, "lora", target="inner", train=["lm_head"])
    assert [path for path in injection.operators if path != "inner"] == ["lm_head"]
    value = injection.operators["lm_head"].value
    with torch.no_grad():
        value.mul_(2)
    inner = torch.tanh(model.inner(model.embed_tokens(ids)))
    assert torch.equal(model.embed_tokens(ids), nn.functional.embedding(ids, value))
    assert torch.allclose(model(ids), nn.functional.linear(inner, value))
    assert not torch.allclose(model(ids), base, atol=1e-3)
    assert model.lm_head.weight is model.embed_tokens.weight
    injection.remove()
    assert torch.equal(model(ids), base)


def test_both_ends_of_a_tie_named_in_train_share_one_value() -> None:
    injection = peftcore.apply(TiedLanguageModel(), "lora", target="inner", train=["lm_head", "embed_tokens"])
    assert len([path for path in injection.operators if path != "inner"]) == 1


# activation


def test_enabled_and_disabled_nest() -> None:
    model, x = perceptron(), torch.ones(1, 4)
    base = model(x)
    one = peftcore.apply(model, Shift, name="one", target="first")
    only_one = model(x)
    two = peftcore.apply(model, Doubling, name="two", target="second")
    both = model(x)
    with one.disabled():
        assert not one.active and two.active
        with two.disabled():
            assert torch.equal(model(x), base)
            with one.enabled():
                assert torch.equal(model(x), only_one)
                with two.enabled():
                    assert torch.equal(model(x), both)
            assert torch.equal(model(x), base)
        assert two.active and not one.active
    assert torch.equal(model(x), both)


def test_blocks_restore_when_an_error_leaves_them() -> None:
    model, x = perceptron(), torch.ones(1, 4)
    injection = peftcore.apply(model, Shift, target="first")
    both = model(x)
    for block in (injection.disabled, lambda: peftcore.activate(model)):
        with pytest.raises(ZeroDivisionError), block():
            raise ZeroDivisionError
        assert torch.equal(model(x), both)


def test_activate_applies_at_once_and_restores_as_a_block() -> None:
    model = perceptron()
    for name in ("a", "b", "c"):
        peftcore.apply(model, Shift, name=name, target="first")
    peftcore.activate(model, "b")
    assert [name for name, each in peftcore.injections(model).items() if each.active] == ["b"]
    with peftcore.activate(model, "c", "a"):
        assert [name for name, each in peftcore.injections(model).items() if each.active] == ["a", "c"]
    assert [name for name, each in peftcore.injections(model).items() if each.active] == ["b"]
    peftcore.activate(model)
    assert not any(each.active for each in peftcore.injections(model).values())


def test_activate_refuses_unknown_names() -> None:
    model = perceptron()
    with pytest.raises(UnknownInjection, match="none"):
        peftcore.activate(model, "lora")
    peftcore.apply(model, "lora", target="first")
    with pytest.raises(UnknownInjection, match=r"'lroa'.*lora"):
        peftcore.activate(model, "lroa")
    assert peftcore.injections(model)["lora"].active


def test_a_to_b_to_a_reproduces_a() -> None:
    model, ids = transformer(), token_ids()
    for seed, name in enumerate("ab"):
        stir(peftcore.apply(model, "lora", name=name), seed=seed)
    outputs = []
    for name in "aba":
        peftcore.activate(model, name)
        outputs.append(model(ids))
    assert torch.equal(outputs[0], outputs[2]) and not torch.allclose(outputs[0], outputs[1], atol=1e-3)


def test_activation_leaves_what_trains_alone() -> None:
    model = perceptron()
    one, two = (peftcore.apply(model, "lora", name=name, target="first") for name in ("one", "two"))
    one.trainable(False)
    peftcore.activate(model, "one")
    assert not any(p.requires_grad for p in one.parameters()) and all(p.requires_grad for p in two.parameters())


def test_other_thread_chooses_for_itself_alone() -> None:
    model, x = perceptron(), torch.ones(1, 4)
    base = model(x)
    peftcore.apply(model, Shift, target="first")
    moved = model(x)
    seen: dict[str, Tensor] = {}
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        seen["as the owner chose"] = model(x)
        with peftcore.activate(model):
            seen["own choice"] = model(x)
            inside.set()
            leave.wait(30)
            seen["own choice, later"] = model(x)
        seen["after"] = model(x)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(30)
    assert torch.equal(model(x), moved)
    leave.set()
    thread.join(30)
    assert torch.equal(seen["as the owner chose"], moved) and torch.equal(seen["after"], moved)
    assert torch.equal(seen["own choice"], base) and torch.equal(seen["own choice, later"], base)


# what the handle tells


def test_summary_tells_the_state() -> None:
    model = transformer()
    injection = peftcore.apply(model, "lora", rank=2, train=["classifier"])
    summary = injection.summary()
    expected = 4 * 2 * 16 + 3 * 8 + 3
    assert (summary.name, summary.method, summary.sites) == ("lora", "lora", 6)
    assert (summary.parameters, summary.trainable) == (expected, expected)
    assert (summary.active, summary.merged, summary.dtypes, summary.devices) == (True, False, ("float32",), ("cpu",))
    assert summary.irregular == ()
    assert repr(injection) == f"Injection({summary})" and f"{expected:,} of {expected:,}" in str(summary)
    injection.merge()
    assert injection.summary().merged and "merged" in str(injection.summary())


def test_summary_flags_what_is_irregular() -> None:
    injection = peftcore.apply(transformer(), "lora")
    next(injection.parameters()).requires_grad_(False)
    assert injection.summary().irregular == ("7 of 8 tensors train",)
    assert "irregular: 7 of 8" in str(injection.summary())


@pytest.mark.parametrize("what", ["replaced", "patched", "ungrafted"])
def test_check_finds_what_is_no_longer_in_place(what: str) -> None:
    model = perceptron()
    injection = peftcore.apply(model, "lora", target=["first", "second"])
    injection.check()
    if what == "replaced":
        model.first = nn.Linear(4, 6)
    if what == "patched":
        model.first.forward = functools.partial(nn.Linear.forward, model.first)
    if what == "ungrafted":
        model.first.__class__ = nn.Linear
    with pytest.raises(InactiveSite, match="first") as caught:
        injection.check()
    assert "second" not in str(caught.value)
    assert injection.summary().irregular


def test_handle_of_a_removed_injection_refuses() -> None:
    model = perceptron()
    injection = peftcore.apply(model, "lora", target="first")
    injection.remove()
    peftcore.apply(model, "lora", target="first")  # the name is in use again, by another
    for act in (
        injection.remove,
        injection.merge,
        injection.unmerge,
        injection.enabled,
        injection.trainable,
        injection.bake,
    ):
        with pytest.raises(UnknownInjection):
            act()
    with pytest.raises(UnknownInjection), injection.disabled():
        pass
    assert list(peftcore.injections(model)) == ["lora"]


def test_base_state_dict_loads_into_an_adapted_host() -> None:
    fresh = transformer()
    model = Transformer()
    injection = peftcore.apply(model, "lora", train=["classifier"])
    stir(injection)
    kept = {key: value.clone() for key, value in injection.state_dict().items()}
    model.load_state_dict(fresh.state_dict())
    assert all(torch.equal(kept[key], value) for key, value in injection.state_dict().items())
    with injection.disabled():
        assert torch.equal(model.eval()(token_ids()), fresh(token_ids()))


def test_adapted_state_dict_round_trips_and_is_strict() -> None:
    models = [transformer() for _ in range(2)]
    injections = [peftcore.apply(model, "lora", train=["classifier"]) for model in models]
    stir(injections[0])
    models[1].load_state_dict(models[0].state_dict())
    assert torch.equal(models[0](token_ids()), models[1](token_ids()))
    broken = {key: value for key, value in models[0].state_dict().items() if not key.endswith("q_proj.lora.A")}
    with pytest.raises(RuntimeError, match=r"q_proj\.lora\.A"):
        models[1].load_state_dict(broken)


# plan


@pytest.mark.parametrize("method", [*ALL, *TOYS], ids=lambda m: m if isinstance(m, str) else m.name)
def test_plan_on_the_meta_device_equals_apply(method: Any) -> None:
    with torch.device("meta"):
        empty = Transformer()
    before = [(path, type(module)) for path, module in empty.named_modules()]
    planned = peftcore.plan(empty, method, train=["norm"])
    assert [(path, type(module)) for path, module in empty.named_modules()] == before
    model = transformer()
    real = peftcore.plan(model, method, train=["norm"])
    total = sum(parameter.numel() for parameter in model.parameters())
    injection = peftcore.apply(model, method, train=["norm"])
    state = injection.state_dict()
    for plan in (planned, real):
        assert [site.path for site in plan.sites] == list(injection.operators)
        assert plan.shapes == {key: value.shape for key, value in state.items()}
        assert plan.trainable == sum(p.numel() for p in injection.parameters() if p.requires_grad)
        assert plan.total == total and plan.share == plan.trainable / total
        assert plan.bytes == sum(value.numel() * value.element_size() for value in state.values())
        assert f"{plan.trainable:,} trainable" in str(plan) and "layers.[0-1]" in plan.tree()


def test_plan_follows_the_wished_dtype() -> None:
    plans = [peftcore.plan(transformer(), "lora", dtype=dtype) for dtype in ("float32", "bfloat16")]
    assert plans[0].bytes == 2 * plans[1].bytes


# witness


class ReadsWeight(nn.Module):
    """A vision attention as some write it: the fused projection is read, never called."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.proj = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = nn.functional.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v))


class Stack(nn.Module):
    def __init__(self, part: Callable[[], nn.Module], depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(part() for _ in range(depth))
        self.use = list(range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for index in self.use:
            x = self.layers[index](x)
        return x


def test_weight_that_is_read_raises_after_the_first_forward() -> None:
    model = Stack(ReadsWeight)
    peftcore.apply(model, "lora", target="qkv")
    with pytest.raises(InactiveSite, match=r"3 adapted sites did not: layers\.0\.qkv.*read"):
        model(torch.randn(2, 5, 4))


def test_witness_judges_every_injection_and_then_goes() -> None:
    model = Stack(ReadsWeight)
    peftcore.apply(model, "lora", target="proj")
    model(torch.randn(2, 5, 4))
    assert not any(isinstance(hook, Witness) for hook in model._forward_hooks.values())
    peftcore.apply(model, "lora", name="second", target="qkv")
    with pytest.raises(InactiveSite, match="qkv"):
        model(torch.randn(2, 5, 4))


def test_removed_injection_is_not_expected_any_more() -> None:
    model = Stack(ReadsWeight)
    peftcore.apply(model, "lora", target="qkv").remove()
    peftcore.apply(model, "lora", target="proj")
    model(torch.randn(2, 5, 4))


def test_sites_are_judged_for_modules_and_for_train_alike_but_only_by_the_method() -> None:
    """A module that the user named in `train` may rest (a head for another task)."""
    model = perceptron()
    model.unused = nn.Linear(3, 2)
    peftcore.apply(model, "lora", target="first", train=["unused"])
    model(torch.randn(2, 4))
    peftcore.apply(model, "lora", name="again", target="unused")
    with pytest.raises(InactiveSite, match="unused"):
        model(torch.randn(2, 4))


def test_dropped_layers_are_exempt() -> None:
    model = Stack(lambda: nn.Sequential(nn.Linear(4, 4)))
    model.use = [1]
    peftcore.apply(model, "lora", target=nn.Linear)
    model(torch.randn(2, 4))
    model(torch.randn(2, 4))


class Mixture(nn.Module):
    """Experts as modules; the router sends every token to the same one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[2](x)


def test_experts_without_tokens_are_exempt() -> None:
    model = Stack(Mixture, depth=1)
    peftcore.apply(model, "lora", target=nn.Linear)
    model(torch.randn(2, 4))
    assert not any(isinstance(hook, Witness) for hook in model._forward_hooks.values())


def test_witness_waits_while_the_injection_does_not_act() -> None:
    model = Stack(ReadsWeight)
    injection = peftcore.apply(model, "lora", target="qkv")
    with injection.disabled():
        model(torch.randn(2, 5, 4))
    with pytest.raises(InactiveSite):
        model(torch.randn(2, 5, 4))


def test_merged_injection_needs_no_forward() -> None:
    model = Stack(ReadsWeight)
    injection = peftcore.apply(model, Shift, target="qkv")
    x = torch.randn(2, 5, 4)
    injection.merge()
    model(x)


# shared state


def test_owned_state_is_registered_and_saved_once() -> None:
    model = transformer()
    injection = peftcore.apply(model, SharedBases)
    assert [key for key in model.state_dict() if key.endswith(".A")] == ["peft.shared__bases.toy_shared.A"]
    assert {"shared:bases.A", "shared:bases.B"} <= set(injection.state_dict())
    assert len(injection.state_dict()) == 2 + 2 * 4
    assert set(injection.shared) == {"bases"}
    assert all(operator.bases.module is injection.shared["bases"] for operator in injection.operators.values())


def test_owned_state_round_trips_through_a_file(tmp_path: Any, fresh_registry: None) -> None:
    peftcore.register(SharedBases)
    model, ids = transformer(), token_ids()
    injection = peftcore.apply(model, "toy_shared", seed=1)
    stir(injection, 0.5)
    injection.save(tmp_path / "adapter")
    again = transformer()
    torch.manual_seed(77)  # the bases come from the file, not from a seed
    loaded = peftcore.load(again, tmp_path / "adapter")
    assert torch.equal(again(ids), model(ids))
    assert torch.equal(loaded.shared["bases"].A, injection.shared["bases"].A)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_owned_state_is_copied_with_the_host() -> None:
    model, ids = transformer(), token_ids()
    injection = peftcore.apply(model, SharedBases)
    stir(injection, 0.5)
    twin = copy.deepcopy(model)
    (theirs,) = peftcore.injections(twin).values()
    bases = {id(operator.bases.module) for operator in theirs.operators.values()}
    assert bases == {id(theirs.shared["bases"])} == {id(twin.get_submodule("peft.shared__bases.toy_shared"))}
    assert id(injection.shared["bases"]) not in bases
    output = model(ids)
    assert torch.equal(twin(ids), output)
    with torch.no_grad():
        theirs.shared["bases"].A.zero_()
    assert torch.equal(model(ids), output) and not torch.allclose(twin(ids), output, atol=1e-3)


def test_owned_state_leaves_with_the_injection() -> None:
    model = transformer()
    before = snapshot(model)
    injection = peftcore.apply(model, SharedBases)
    other = peftcore.apply(model, SharedBases, name="other")
    assert injection.shared["bases"] is not other.shared["bases"]
    injection.remove()
    assert [key for key in model.state_dict() if "shared__" in key] == [
        "peft.shared__bases.other.A",
        "peft.shared__bases.other.B",
    ]
    other.remove()
    assert snapshot(model) == before


def test_owned_state_follows_the_host_to_another_dtype_and_device() -> None:
    model = transformer()
    injection = peftcore.apply(model, SharedBases)
    model.to(torch.float64)
    assert injection.shared["bases"].A.dtype == torch.float64
    assert model(token_ids()).dtype == torch.float64


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
