"""Checks of switching, freezing, reporting and removing: one injection's life, and several living on one host."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

import peftcore
from peftcore.errors import DuplicateInjection, InactiveSite, UnknownInjection
from peftcore.injection import Injection
from peftcore.testing.kit import Case, NotApplicable, check
from peftcore.testing.tools import differences, findable, partners, raises, trace, without_fast_paths

HOOKED = "an operator or `inject` changes the host by itself; record it with the surgeon's verbs, which are undone"
STATE = (
    "state outside the operator's own tensors (class attributes, globals, caches); keep it in parameters and buffers"
)
COUNTS = "`trainable` or `inject` sets requires_grad on tensors of the host or of other injections"


@check("disabled() gives the base's outputs to the bit, and the adapter's again after the block", HOOKED)
def disabling_restores_the_base(case: Case) -> None:
    model, inputs = case.fresh()
    base = case.quiet(model, inputs)
    injection = case.filled(model)
    adapted = case.quiet(model, inputs)
    case.expect_moved(adapted, base, "the filled adapter's output")
    with injection.disabled():
        case.expect_equal(case.quiet(model, inputs), base, "output inside disabled()")
    case.expect_equal(case.quiet(model, inputs), adapted, "output after disabled()")


@check("leaving disabled() restores the state before, also an irregular one, also after an exception", COUNTS)
def leaving_disabled_restores_the_state_before(case: Case) -> None:
    model, inputs = case.fresh()
    injection = case.filled(model)
    case.quiet(model, inputs)
    for active in (True, False):
        peftcore.activate(model, *[injection.name] * active)
        next(injection.parameters()).requires_grad_(not active)
        before = trace(model)
        with raises(case, KeyError, "the block's own exception"), injection.disabled():
            case.quiet(model, inputs)
            raise KeyError
        case.expect(injection.active is active, f"an injection that was {'' if active else 'in'}active changed sides")
        case.expect(not (wrong := differences(before, trace(model))), f"other than before: {wrong}")


@check(
    "disabled() works on a merged injection: base inside, the merged weights again after it, also after an exception",
    "`merged` gives other values at the second call; it must be a function of the weight and the operator's tensors",
    when=lambda tags: tags.mergeable,
)
def disabling_works_while_merged(case: Case) -> None:
    model, inputs = case.fresh()
    base = case.quiet(model, inputs)
    injection = case.filled(model)
    injection.merge()
    merged, before = case.quiet(model, inputs), trace(model)
    with raises(case, KeyError, "the block's own exception"), injection.disabled():
        case.expect_equal(case.quiet(model, inputs), base, "output inside disabled()")
        raise KeyError
    case.expect(injection.merged, "not merged any more after the block")
    wrong = differences(before, trace(model), passing="identity of")  # a merge may add biases
    case.expect(not wrong, f"other than before: {wrong}")
    case.expect_equal(case.quiet(model, inputs), merged, "output after disabled()")


@check("switching from A to B and back gives A's outputs to the bit", STATE)
def switching_back_reproduces_the_first(case: Case) -> None:
    model, inputs = case.fresh()
    for seed, name in enumerate(("A", "B")):
        case.filled(model, seed + 1, name=name)
    outputs = []
    for name in ("A", "B", "A"):
        peftcore.activate(model, name)
        outputs.append(case.quiet(model, inputs))
    case.expect_moved(outputs[1], outputs[0], "B's output, from A's,")
    case.expect_equal(outputs[2], outputs[0], "A's output after B")


def _called_alone(model: nn.Module, paths: list[str], forward: Callable[[], Any]) -> dict[str, list[tuple[Any, ...]]]:
    """The calls of some modules in one forward: inputs, keyword inputs and output."""
    calls: dict[str, list[tuple[Any, ...]]] = {path: [] for path in paths}

    def hook(path: str) -> Callable[..., None]:
        return lambda module, args, kwargs, output: calls[path].append((args, kwargs, output))

    handles = [model.get_submodule(p).register_forward_hook(hook(p), with_kwargs=True) for p in paths]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return calls


@check(
    "where targets overlap in part, an injection acts only where it lives",
    "`inject` walks over the model instead of asking `surgeon.sites()`, so `exclude` is not seen",
)
def an_injection_acts_only_where_it_lives(case: Case) -> None:
    plain, inputs = case.fresh()
    plain.requires_grad_(False)  # torch rounds otherwise with matrices that are frozen
    model, _ = case.fresh()
    everywhere = case.filled(model, name="everywhere")
    places = list(dict.fromkeys(graft.site.module_path for graft in everywhere.grafts))
    chosen = list(dict.fromkeys(site.module_path for sites in everywhere.selections.values() for site in sites))
    left_out = [path for path in chosen if path in places][::2]
    if len(left_out) == len(places):
        raise NotApplicable("a single place cannot overlap in part")
    part = case.filled(model, 2, name="part", exclude=left_out)
    lives = {site.module_path for graft in part.grafts for site in graft.holders}
    peftcore.activate(model, "part")
    free = [p for p in left_out if not any(f"{other}.".startswith(f"{p}.") for other in lives)]
    free = [path for path in free if not lives.intersection(_tied_to(plain, path))]
    case.expect(bool(lives - set(left_out)), "it lives nowhere")
    case.expect(
        not lives.intersection(left_out), f"lives where it was excluded: {sorted(lives.intersection(left_out))}"
    )
    with without_fast_paths():
        called = _called_alone(model, free, lambda: case.quiet(model, inputs))
    for path, calls in called.items():
        for args, kwargs, output in calls:
            with torch.no_grad(), without_fast_paths():
                expected = plain.get_submodule(path)(*args, **kwargs)
            for got, want in zip(_tensors(output), _tensors(expected), strict=True):
                case.expect_equal(got, want, f"output of {path}, where only the inactive injection lives,")


def _tied_to(model: nn.Module, path: str) -> set[str]:
    mine = {id(p) for p in model.get_submodule(path).parameters()}
    return {
        other for other, module in model.named_modules() if any(id(p) in mine for p in module.parameters(recurse=False))
    }


def _tensors(output: Any) -> list[torch.Tensor]:
    return [each for each in (output if isinstance(output, tuple) else (output,)) if isinstance(each, torch.Tensor)]


@check(
    "several active injections act as merging them one after the other does, also among other kinds of operators",
    "`merged` and `forward` are not the same mathematics, or depend on more than the weight that is handed in",
    when=lambda tags: tags.mergeable,
)
def several_active_act_as_merged_in_order(case: Case) -> None:
    for first, second in partners(case):
        model, inputs = case.fresh()
        base = case.quiet(model, inputs)
        injections = [first(model, 1, "first"), second(model, 2, "second")]
        both = case.quiet(model, inputs)
        for injection in injections:
            injection.merge()
        names = " then ".join(f"{type(i.method).name}" for i in injections)
        case.expect_moved(both, base, f"{names}: the output")
        case.expect_close(case.quiet(model, inputs), both, f"{names}: merged, from both active", factor=3)


@check("trainable() alone decides what trains, and nothing of the host ever does", COUNTS)
def requires_grad_follows_trainable(case: Case) -> None:
    model, inputs = case.fresh()
    host = list(model.parameters())
    injection = case.apply(model)
    training = [parameter.requires_grad for parameter in injection.parameters()]
    case.expect(any(training), "nothing trains after apply")
    for mode in (False, True):
        injection.trainable(mode)
        want = [mode and each for each in training]
        for step in (
            lambda: None,
            lambda: peftcore.activate(model),
            lambda: injection.enabled(),
            lambda: _toggled(injection),
        ):
            step()
            case.quiet(model, inputs)
            case.expect([p.requires_grad for p in injection.parameters()] == want, f"trainable({mode}) does not hold")
            case.expect(not any(p.requires_grad for p in host), "a tensor of the host trains")


def _toggled(injection: Injection) -> None:
    with injection.disabled():
        pass
    if injection.method.tags.mergeable:
        injection.merge()
        injection.unmerge()


@check("what was frozen or trains stays so when another injection is applied, loaded or removed", COUNTS)
def others_leave_requires_grad_alone(case: Case) -> None:
    model, _ = case.fresh()
    first, second = case.apply(model, name="first"), case.apply(model, name="second")
    first.trainable(False)
    before = [p.requires_grad for each in (first, second) for p in each.parameters()]
    with tempfile.TemporaryDirectory() as folder, findable(case.method):
        first.save(folder)
        others = [case.apply(model, name="third"), peftcore.load(model, folder, name="fourth", trainable=True)]
    steps: tuple[Callable[[], Any], ...] = (lambda: None, others[1].remove, others[0].remove)
    for step in steps:
        step()
        now = [p.requires_grad for each in (first, second) for p in each.parameters()]
        case.expect(now == before, "requires_grad of an injection changed when another came or went")


@check(
    "summary() tells what is: sites, sizes, what trains, dtypes, active, merged",
    "operators keep trained tensors where `parameters()` does not see them: lists, closures, the host",
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
    "what stands in the host is not the operator that `surgeon.graft` returned",
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


@check("a name that is taken or impossible is refused, and nothing changes", HOOKED)
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
    "`inject` walks over `model.modules()` instead of asking `surgeon.sites()`",
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


class _EverythingConfig(peftcore.MethodConfig):
    method: Literal["everything"] = "everything"


class _Everything(peftcore.Method):
    """Lists every tensor below the target; for looking only."""

    name = "everything"
    Config = _EverythingConfig
    tags = peftcore.Tags(category="selective", paper="none")
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
    HOOKED,
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


@check("a removed injection can be applied again under its name, and starts like new", STATE)
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
    "injections can be removed in any order; those that stay act as if they were alone, none is exactly the base", STATE
)
def injections_leave_in_any_order(case: Case) -> None:
    for order in ("ACB", "BAC", "CBA"):
        model, inputs = case.fresh()
        base = case.quiet(model, inputs)
        found = {name: case.filled(model, seed, name=name) for seed, name in enumerate("ABC")}
        for index, name in enumerate(order):
            stay = [other for other in "ABC" if other not in order[: index + 1]]
            with peftcore.activate(model, *stay):
                expected = case.quiet(model, inputs)
            found[name].remove()
            case.expect(list(peftcore.injections(model)) == stay, f"{order}: {list(peftcore.injections(model))} stay")
            case.expect_equal(case.quiet(model, inputs), expected, f"{order}: output without {order[: index + 1]}")
        case.expect_equal(case.quiet(model, inputs), base, f"{order}: output without any")


@check(
    "a removed or unknown injection is refused by every call, and nothing changes",
    "the name is read from somewhere else than the host's injections",
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
