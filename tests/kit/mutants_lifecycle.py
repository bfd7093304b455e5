"""For each check of an injection's life a method that fails it, and it only."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from mutant_base import Entry, Small, graft_all, mutant
from torch import Tensor, nn

import peftcore
from peftcore import Injection
from peftcore.author import Method, MethodConfig, Site
from peftcore.contract.surgeon_protocol import Surgeon
from peftcore.forward.choice.active_adapters import Choice
from peftcore.forward.choice.scopes import Choices, Chosen, Statement
from peftcore.forward.state.host_state import HostState
from peftcore.forward.state.slot import slot_of
from peftcore.injection.injection import Summary
from peftcore.layers.kinds import Linear
from peftcore.surgery import surgeon as surgeons
from peftcore.surgery.watched_sites import WatchedSites
from peftcore.testing import Case


def sabotaged(name: str, **calls: Callable[..., Any]) -> type[Method]:
    """A method that puts functions of its own in the place of its injections' methods."""

    def trainable(self: Method, model: nn.Module, config: Any, injection: Injection) -> None:
        Method.trainable(self, model, config, injection)
        for call, function in calls.items():
            injection.__dict__[call] = functools.partial(function, injection)

    return mutant(name, trainable=trainable)


def chosen(state: HostState, names: Iterable[str]) -> Chosen:
    return Chosen(state, Choice(state.ordered(names)))


@contextmanager
def off_afterwards(injection: Injection) -> Iterator[None]:
    merged = injection.merged
    with Injection.disabled(injection):
        yield
    if not merged:
        chosen(injection.state, ())


@contextmanager
def off_after_errors(injection: Injection) -> Iterator[None]:
    merged = injection.merged
    try:
        with Injection.disabled(injection):
            yield
    except KeyError:
        if not merged:
            chosen(injection.state, ())
        raise


@contextmanager
def unmerged_after_errors(injection: Injection) -> Iterator[None]:
    try:
        with Injection.disabled(injection):
            yield
    except KeyError:
        injection.unmerge()
        raise


class RemembersTheFirst(Choices):
    """Having gone from A to B, the way back to A is lost."""

    def set(self, choice: Choice) -> Statement:
        wanted = choice.active
        past = self.__dict__.setdefault("past", [])
        if len(wanted) == 1 and past[-2:-1] == [wanted] and len(past[-1]) == 1 and past[-1] != wanted:
            return super().set(self.choice)
        past.append(wanted)
        return super().set(choice)


def with_memory(self: Method, model: nn.Module, config: Any, injection: Injection) -> None:
    Method.trainable(self, model, config, injection)
    if isinstance(injection, Injection):
        injection.state.choices.__class__ = RemembersTheFirst


def ignores_exclude_of_the_second(self: Method, model: nn.Module, config: Any, surgeon: Surgeon) -> None:
    sites = surgeon.sites()
    if surgeon.wishes.exclude and peftcore.injections(model):
        sites = surgeon.resolver.sites(surgeon.wishes.target or self.target)
    for site in sites:
        surgeon.graft(site, Small, config)


class DoublesOnOthers(Small):
    """Twice the update where the inner layer is an operator of another method."""

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        inner = getattr(call, "func", None)
        foreign = isinstance(inner, nn.Module) and not isinstance(inner, Small)
        return super().forward(call, x) + (x @ self.A.T @ self.B.T if foreign else 0.0)


def thaws_the_host(injection: Injection) -> Chosen:
    activation = Injection.enabled(injection)
    next(injection.model.parameters()).requires_grad_(True)
    return activation


def trains_all_operators(self: Method, model: nn.Module, config: Any, injection: Injection) -> None:
    Method.trainable(self, model, config, injection)
    for name, parameter in model.named_parameters():
        if ".peft." in f".{name}":
            parameter.requires_grad_(True)


def on_another_device(injection: Injection) -> Summary:
    return replace(Injection.summary(injection), devices=("cuda:7",))


def nothing_broken(injection: Injection) -> Iterator[str]:
    yield from ()


class Forgetful(dict[str, Injection]):
    """Does not know that "mine" is taken."""

    def __contains__(self, name: object) -> bool:
        return name != "mine" and super().__contains__(name)


def with_forgetful_host(self: Method, model: nn.Module, config: Any, injection: Injection) -> None:
    Method.trainable(self, model, config, injection)
    if isinstance(injection, Injection):
        injection.state.injections = Forgetful(injection.state.injections)


class Inert(Small):
    """A parameter that does nothing."""

    def __init__(self, site: Site, config: MethodConfig) -> None:
        nn.Module.__init__(self)
        self.layer = site.layer
        self.nothing = nn.Parameter(torch.zeros(1))

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        return call(x)


def walks_over_the_host(self: Method, model: nn.Module, config: Any, surgeon: Surgeon) -> None:
    graft_all(self, model, config, surgeon)
    others = list(peftcore.injections(model).values())
    if len(others) != 1 or any(
        bool(parameter.any()) for name, parameter in model.named_parameters() if name.endswith(".B")
    ):
        return
    for path, operator in model.named_modules():
        if isinstance(operator, Small):
            surgeon.graft(Site(operator, path, "A", Linear(called=True), form="activation"), Inert, config)


def evaluates_the_host(self: Method, model: nn.Module, config: Any, injection: Injection) -> None:
    Method.trainable(self, model, config, injection)
    if isinstance(injection, Injection):
        model.eval()


KEPT: weakref.WeakKeyDictionary[nn.Module, Tensor] = weakref.WeakKeyDictionary()


class StartsWhereTheLastEnded(Small):
    """Keeps its factor in a global cache, by module."""

    def __init__(self, site: Site, config: MethodConfig) -> None:
        super().__init__(site, config)
        if site.meta or slot_of(site.module) is not None:
            return
        self.A.data = KEPT.setdefault(site.module, self.A.data)


def switches_others_off(injection: Injection) -> None:
    first = next(iter(injection.state.injections)) == injection.name
    Injection.remove(injection)
    if first and len(injection.state.injections) == 2:
        chosen(injection.state, ())


def enabled_when_gone(injection: Injection) -> Chosen:
    return chosen(injection.state, (*injection.state.current(), injection.name))


class MissesNothing(Case):
    """Operators do not look for their modules, so the model is broken instead."""

    def quiet(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        with mock.patch.object(WatchedSites, "check", lambda *_: None):
            return super().quiet(model, inputs)


class AdaptsTwice(Case):
    """No method can say whose modules are."""

    def apply(self, model: nn.Module, **changes: Any) -> Injection:
        with mock.patch.object(surgeons, "check_apart", lambda surgeon: None):
            return super().apply(model, **changes)


MUTANTS: dict[str, Entry] = {
    "a_replaced_module_is_missed": (mutant("misses_nothing"), "mlp", MissesNothing),
    "a_shared_backbone_is_adapted_once": (mutant("adapts_twice"), "mlp", AdaptsTwice),
    "disabling_restores_the_base": (sabotaged("off_afterwards", disabled=off_afterwards), "mlp"),
    "leaving_disabled_restores_the_state_before": (sabotaged("off_after_errors", disabled=off_after_errors), "mlp"),
    "disabling_works_while_merged": (sabotaged("unmerged_after_errors", disabled=unmerged_after_errors), "mlp"),
    "switching_back_reproduces_the_first": (mutant("remembers_the_first", trainable=with_memory), "mlp"),
    "an_injection_acts_only_where_it_lives": (mutant("ignores_exclude", inject=ignores_exclude_of_the_second), "mlp"),
    "several_active_act_as_merged_in_order": (mutant("doubles_on_others", DoublesOnOthers), "mlp"),
    "requires_grad_follows_trainable": (sabotaged("thaws_the_host", enabled=thaws_the_host), "mlp"),
    "others_leave_requires_grad_alone": (mutant("trains_all_operators", trainable=trains_all_operators), "mlp"),
    "the_summary_is_true": (sabotaged("on_another_device", summary=on_another_device), "mlp"),
    "irregular_states_are_flagged": (sabotaged("nothing_broken", _broken=nothing_broken), "mlp"),
    "impossible_names_are_refused": (mutant("forgetful", trainable=with_forgetful_host), "mlp"),
    "operators_are_no_targets": (mutant("walks_over_the_host", inject=walks_over_the_host), "mlp"),
    "removing_leaves_no_trace": (mutant("evaluates_the_host", trainable=evaluates_the_host), "mlp"),
    "a_name_can_be_used_again": (mutant("starts_where_the_last_ended", StartsWhereTheLastEnded), "mlp"),
    "injections_leave_in_any_order": (sabotaged("switches_others_off", remove=switches_others_off), "mlp"),
    "removed_injections_are_refused": (sabotaged("enabled_when_gone", enabled=enabled_when_gone), "mlp"),
}
