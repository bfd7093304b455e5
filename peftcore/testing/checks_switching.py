"""Checks of several injections on one host: which are active, and which train."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import peftcore
from peftcore.errors import CompositionError
from peftcore.injection.injection import Injection
from peftcore.testing.kit import Case, NotApplicable, check
from peftcore.testing.tools import differences, findable, overriding, partners, raises, trace, without_fast_paths


@check(
    "disabled() gives the base's outputs to the bit, and the adapter's again after the block",
    cause="`inject`, `trainable` or an operator changes the host by itself, and acts while nothing is active",
    remedy="change it by the surgeon's verbs: an operator is called only while its injection is active",
)
def disabling_restores_the_base(case: Case) -> None:
    model, inputs = case.fresh()
    base = case.quiet(model, inputs)
    injection = case.filled(model)
    adapted = case.quiet(model, inputs)
    case.expect_moved(adapted, base, "the filled adapter's output")
    with injection.disabled():
        case.expect_equal(case.quiet(model, inputs), base, "output inside disabled()")
    case.expect_equal(case.quiet(model, inputs), adapted, "output after disabled()")


@check(
    "leaving disabled() restores the state before, also an irregular one, also after an exception",
    cause="the method switches injections, modes or `requires_grad` by itself, behind the block's back",
    remedy="leave switching to peftcore; say what trains in `trainable`, once",
)
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
    cause="`merged` gives other values at the second call",
    remedy="make it a function of the weight and the operator's tensors: nothing drawn, counted or kept",
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


@check(
    "switching from A to B and back gives A's outputs to the bit",
    cause="state outside the operator's own tensors (class attributes, globals, caches) is that of the other injection",
    remedy="keep it in parameters and buffers of the operator",
)
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
    """Return the calls of some modules in one forward, by path. Each call is a tuple of positional inputs, keyword
    inputs and output."""
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
    cause="`inject` walks over the model instead of asking `surgeon.sites()`, so `exclude` is not seen",
    remedy="graft where `surgeon.sites()` says, and nowhere else",
)
def an_injection_acts_only_where_it_lives(case: Case) -> None:
    plain, inputs = case.fresh()
    plain.requires_grad_(False)  # torch rounds otherwise with matrices that are frozen
    model, _ = case.fresh()
    everywhere = case.filled(model, name="everywhere")
    places = list(dict.fromkeys(graft.site.module_path for graft in everywhere.grafts))
    chosen = list(dict.fromkeys(site.module_path for sites in everywhere.selections.values() for site in sites))
    parts = [path for path in chosen if path in places and not any(p.startswith(f"{path}.") for p in places)]
    left_out = parts[::2]
    if len(left_out) == len(places) or set(left_out) >= set(chosen):
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
    cause="`merged` and `forward` are not the same mathematics, or look past what is handed in: `call`, the weight",
    remedy="ask neither who is behind `call` nor what the site's weight is: either may be another method's work",
    when=lambda tags: tags.mergeable,
)
def several_active_act_as_merged_in_order(case: Case) -> None:
    for first, second in partners(case):
        model, inputs = case.fresh()
        base = case.quiet(model, inputs)
        injections = [first(model, 1, "first"), second(model, 2, "second")]
        names = " then ".join(f"{type(i.method).name}" for i in injections)
        try:
            both = case.quiet(model, inputs)
        except CompositionError as error:
            case.expect(overriding(injections[1]), f"{names}: refused ({error})")
            continue
        for injection in injections:
            injection.merge()
        case.expect_moved(both, base, f"{names}: the output")
        case.expect_close(case.quiet(model, inputs), both, f"{names}: merged, from both active", factor=3)


@check(
    "trainable() alone decides what trains, and nothing of the host ever does",
    cause="`requires_grad` is set on tensors of the host, or elsewhere than in `trainable`",
    remedy="choose what trains in `trainable`, among the operators' parameters",
)
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


@check(
    "what was frozen or trains stays so when another injection is applied, loaded or removed",
    cause="`trainable` goes over the model's parameters, those of other injections included",
    remedy="go over `injection.parameters()`",
)
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
