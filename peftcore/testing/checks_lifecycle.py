"""Checks of an injection's name, its removal, and its reports, such as `summary`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

import peftcore
from peftcore.author import Method, MethodConfig, Tags
from peftcore.errors import (
    DuplicateInjection,
    InactiveSite,
    TargetError,
    UnknownInjection,
    UnsupportedHost,
    UnsupportedSite,
)
from peftcore.testing.kit import Case, NotApplicable, check
from peftcore.testing.tools import differences, overriding, raises, trace


@check(
    "summary() tells what is: sites, sizes, what trains, dtypes, active, merged",
    cause="trained tensors are where `parameters()` does not see them: lists, closures, the host",
    remedy="make them parameters of the operator, or of a module that `surgeon.own` registers",
)
def the_summary_is_true(case: Case) -> None:
    model, _ = case.fresh()
    host = {id(parameter) for parameter in model.parameters()}
    injection = case.apply(model, dtype="bfloat16")
    added = [parameter for parameter in model.parameters() if id(parameter) not in host]
    summary = injection.summary()
    case.expect(
        summary.parameters == sum(p.numel() for p in added), f"{summary.parameters} parameters are not what was added"
    )
    case.expect(
        summary.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad), "what trains is miscounted"
    )
    case.expect(summary.dtypes == ("bfloat16",), f"dtypes {summary.dtypes}")
    case.expect(
        summary.devices == ("cpu",) and summary.sites == len(injection.operators), "devices or sites are miscounted"
    )
    case.expect(
        summary.active and not summary.merged and not summary.irregular, f"a fresh injection is called {summary}"
    )
    with peftcore.activate(model):
        case.expect(not injection.summary().active, "an inactive injection is called active")
    if case.tags.mergeable:
        injection.merge()
        case.expect(injection.summary().merged, "a merged injection is not called so")


@check(
    "summary() and check() name what is irregular: partly frozen, a replaced module, a forward set on the instance",
    cause="what stands in the host is not the operator that `surgeon.graft` returned",
    remedy="put nothing else in its place; what wraps it belongs into the operator",
)
def irregular_states_are_flagged(case: Case) -> None:
    model, _ = case.fresh()
    injection = case.apply(model)
    injection.check()
    case.expect(not injection.summary().irregular, f"a fresh injection is irregular: {injection.summary()}")
    parameters = list(injection.parameters())
    if len(parameters) > 1:
        parameters[0].requires_grad_(not parameters[0].requires_grad)
        case.expect(bool(injection.summary().irregular), "one tensor frozen by hand is not flagged")
        parameters[0].requires_grad_(not parameters[0].requires_grad)
    site = injection.sites[0]
    site.module.__dict__["forward"] = lambda *args, **kwargs: None
    with raises(case, InactiveSite, "a forward set on the instance", names=site.module_path):
        injection.check()
    del site.module.__dict__["forward"]
    injection.check()
    if not site.module_path:
        return
    parent, _, leaf = site.module_path.rpartition(".")
    model.get_submodule(parent)._modules[leaf] = nn.Identity()
    case.expect(bool(injection.summary().irregular), "a replaced module is not flagged")


@check(
    "a module that was replaced since is missed in the next forward that should have it, and in no other",
    cause="an operator acts through another module than the one at which it was grafted, or none looks for it",
    remedy="graft at the modules that the model calls, by the surgeon's verbs",
    hosts=("mlp", "encoder", "llama"),
)
def a_replaced_module_is_missed(case: Case) -> None:
    bare, inputs = case.fresh()
    model, _ = case.fresh()
    injection = case.filled(model)
    case.quiet(model, inputs)
    paths = [graft.site.module_path for graft in injection.grafts if graft.site.module_path]
    if not paths:
        raise NotApplicable("it acts at the model itself")
    parent, _, leaf = paths[-1].rpartition(".")
    model.get_submodule(parent)._modules[leaf] = bare.get_submodule(paths[-1])
    for _ in range(2):
        with raises(case, InactiveSite, "a forward without a module that was adapted", names=paths[-1]):
            case.quiet(model, inputs)
    with peftcore.activate(model):
        case.quiet(model, inputs)


class _Over(nn.Module):
    """A model that contains another model as its backbone, like the actor or critic of reinforcement learning."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.backbone(*args, **kwargs)


@check(
    "a backbone of two models is adapted through one of them; an adapter through the other one is refused",
    cause="`inject` changes modules by itself, so nobody knows whose they are",
    remedy="graft by the surgeon's verbs alone",
    hosts=("mlp", "llama"),
)
def a_shared_backbone_is_adapted_once(case: Case) -> None:
    model, inputs = case.fresh()
    actor, critic = _Over(model), _Over(model)
    try:
        injection = case.filled(actor)
    except (TargetError, UnsupportedSite, UnsupportedHost) as error:
        raise NotApplicable(f"it does not act below another model: {error}") from None
    adapted, before = case.quiet(actor, inputs), trace(actor)
    with raises(case, UnsupportedHost, "an adapter of another model over the same modules"):
        case.apply(critic, name="other")
    case.expect(not (wrong := differences(before, trace(actor))), f"changed: {wrong}")
    case.expect_equal(case.quiet(actor, inputs), adapted, "output after an adapter was refused")
    injection.remove()
    case.filled(critic, name="other")


@check(
    "a name that is taken or impossible is refused, and nothing changes",
    cause="the host's injections are listed or changed by the method itself",
    remedy="leave names to `apply`, and change the host by the surgeon's verbs, which come after it has looked",
)
def impossible_names_are_refused(case: Case) -> None:
    model, _ = case.fresh()
    case.filled(model, name="mine")
    before = trace(model)
    for name in ("mine", "", "a.b"):
        with raises(case, DuplicateInjection, f"the name {name!r}", names=repr(name)):
            case.apply(model, name=name)
        case.expect(not (wrong := differences(before, trace(model))), f"changed by a refused name: {wrong}")


@check(
    "operators of one injection are never targets of another, whatever the target says",
    cause="`inject` walks over `model.modules()` instead of asking `surgeon.sites()`",
    remedy="graft where `surgeon.sites()` says: it leaves out operators",
)
def operators_are_no_targets(case: Case) -> None:
    model, _ = case.fresh()
    first = case.apply(model, name="first")
    second = case.apply(model, name="second")
    case.expect(list(second.operators) == list(first.operators), "the second injection stands elsewhere")
    inside = {id(module) for _, operator in first.modules() for module in operator.modules()}
    for target in ("*", lambda path, module: bool(module._parameters)):
        found = peftcore.plan(model, _Everything, target=target).sites
        case.expect(not any(id(site.module) in inside for site in found), f"target {target!r} reaches operators")


class _EverythingConfig(MethodConfig):
    method: Literal["everything"] = "everything"


class _Everything(Method):
    """A method that replaces every tensor below the target. It is used only to find these tensors."""

    name = "everything"
    Config = _EverythingConfig
    tags = Tags(category="selective", paper="none")
    target = "*"

    def inject(self, model: nn.Module, config: Any, surgeon: Any) -> None:
        for site in surgeon.sites():
            for tensor in site.tensors():
                if not site.missing(tensor):
                    surgeon.replace(site.at(tensor))

    @staticmethod
    def parameter_count(site: Any, config: Any) -> int:
        return int(site.numel)


@check(
    "remove() leaves no trace: classes, attributes, hooks, requires_grad, training mode, every bit of every tensor",
    cause="`inject`, `trainable` or an operator changes the host by itself: a mode, an attribute, a hook",
    remedy="record it with the surgeon's verbs, which are undone; what is left is named above",
)
def removing_leaves_no_trace(case: Case) -> None:
    model, inputs = case.fresh()
    for index, module in enumerate(model.modules()):
        module.training = index % 3 == 0
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    before = trace(model)
    injection = case.filled(model)
    case.quiet(model, inputs)
    injection.remove()
    case.expect(not (wrong := differences(before, trace(model))), f"left behind: {wrong}")


@check(
    "a removed injection can be applied again under its name, and starts like new",
    cause="the start comes from a cache that outlives the injection, by module or by class",
    remedy="compute it in `__init__`, from the site and torch's generator",
)
def a_name_can_be_used_again(case: Case) -> None:
    model, inputs = case.fresh()
    outputs = []
    for _ in range(2):
        injection = case.apply(model, name="again", seed=3)
        start = {key: value.clone() for key, value in injection.state_dict().items()}
        fresh = case.quiet(model, inputs)
        with torch.no_grad():
            for parameter in injection.parameters():
                parameter.add_(0.1)
        case.quiet(model, inputs)
        injection.remove()
        outputs.append((fresh, start))
    case.expect_equal(outputs[1][0], outputs[0][0], "output when applied again")
    for key, value in outputs[0][1].items():
        case.expect_equal(outputs[1][1][key], value, key)


@check(
    "injections can be removed in any order; those that stay act as if they were alone, none is exactly the base",
    cause="an injection touches others when it goes, or shares state with them",
    remedy="share within one injection alone, by `surgeon.own`, and leave the others alone",
)
def injections_leave_in_any_order(case: Case) -> None:
    for order in ("ACB", "BAC", "CBA"):
        model, inputs = case.fresh()
        base = case.quiet(model, inputs)
        found = {name: case.filled(model, seed, name=name) for seed, name in enumerate("ABC")}
        for index, name in enumerate(order):
            stay = [other for other in "ABC" if other not in order[: index + 1]]
            alone = overriding(found[name])
            with peftcore.activate(model, *(stay[:1] if alone else stay)):
                expected = case.quiet(model, inputs)
            if alone:
                peftcore.activate(model, *stay[:1])
            found[name].remove()
            case.expect(list(peftcore.injections(model)) == stay, f"{order}: {list(peftcore.injections(model))} stay")
            case.expect_equal(case.quiet(model, inputs), expected, f"{order}: output without {order[: index + 1]}")
        case.expect_equal(case.quiet(model, inputs), base, f"{order}: output without any")


@check(
    "a removed or unknown injection is refused by every call, and nothing changes",
    cause="the method replaces calls of its injection, which then do not ask whether it is there",
    remedy="override functions of `Method`, not of `Injection`",
)
def removed_injections_are_refused(case: Case) -> None:
    model, _ = case.fresh()
    gone, stays = case.filled(model, name="gone"), case.filled(model, name="stays")
    gone.remove()
    before = trace(model)
    refused: list[Callable[[], Any]] = [gone.remove, gone.merge, gone.unmerge, gone.bake, gone.enabled, gone.trainable]
    refused += [gone.disabled().__enter__, lambda: peftcore.activate(model, "stays", "gone")]
    for index, call in enumerate(refused):
        with raises(case, UnknownInjection, f"call {index} of a removed injection", names="gone"):
            call()
    case.expect(stays.active and list(peftcore.injections(model)) == ["stays"], "the other injection is touched")
    case.expect(not (wrong := differences(before, trace(model))), f"changed: {wrong}")
