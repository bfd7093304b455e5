"""Installing is all or nothing, and hosts that cannot be adapted are refused unchanged."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from core_toys import (
    BreakingOperator,
    Doubling,
    DoublingOperator,
    Fragile,
    Shift,
    irregular,
    perceptron,
    snapshot,
    token_ids,
    transformer,
)
from torch import Tensor, nn

import peftcore
from peftcore.author import hookimpl
from peftcore.errors import (
    UnsupportedHost,
)
from peftcore.registry.plugins import registry
from peftcore.surgery import installation


def test_container_of_nothing_but_containers_around_it_is_refused() -> None:
    with pytest.raises(UnsupportedHost, match="container"):
        peftcore.apply(nn.Sequential(nn.Sequential()), StandOnRoot)


class StandOnRoot(peftcore.author.Method):
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


def test_users_parameter_changes_after_apply_survive_where_they_are_not_ours() -> None:
    """What the user thawed while the adapter was on stays thawed; what apply froze comes back."""
    model = transformer()
    model.norm.weight.requires_grad_(False)
    injection = peftcore.apply(model, "lora")
    model.norm.weight.requires_grad_(True)
    injection.remove()
    assert all(parameter.requires_grad for parameter in model.parameters())


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


class Breaks(peftcore.author.Method):
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
