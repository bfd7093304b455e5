"""Checks of `apply`: the effect of a fresh adapter, its sites and its costs, and that the host is unchanged after an
error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import peftcore
from peftcore.author import Tags
from peftcore.errors import InactiveSite, TargetError, UnsupportedSite
from peftcore.injection.injection import Injection
from peftcore.testing.kit import Case, NotApplicable, check, fill
from peftcore.testing.probes import Holder, Interrupted, Unused, Wrapper, counted_calls, interrupted, zoo
from peftcore.testing.tools import differences, raises, trace


def planned(case: Case, model: nn.Module, **changes: Any) -> peftcore.Plan:
    """Return the plan of the injection that `case.apply` would install."""
    arguments: dict[str, Any] = {**case.options, **changes}
    try:
        return peftcore.plan(model, case.method, **arguments)
    except TargetError:
        if "target" in arguments or case.host.fallback is None:
            raise
        return peftcore.plan(model, case.method, target=case.host.fallback, **arguments)


def _identity_options(case: Case) -> dict[str, Any]:
    return dict(case.tags.identity_options or {})


def _promises_identity(tags: Tags) -> bool:
    return tags.identity_at_init or tags.identity_options is not None


@check(
    "a fresh adapter leaves outputs unchanged, with `identity_options` where defaults do not",
    cause="the factor that should start at zero (or the gain that should start at one) does not",
    remedy="set it in the operator's `__init__`; where the paper starts elsewhere, declare `identity_at_init=False`",
    when=_promises_identity,
)
def a_fresh_adapter_changes_nothing(case: Case) -> None:
    model, inputs = case.fresh()
    base = case.quiet(model, inputs)
    case.apply(model, **_identity_options(case))
    case.expect_close(case.quiet(model, inputs), base, "a fresh adapter's output")


def adapted_zoo(case: Case, **changes: Any) -> Iterator[tuple[str, Holder, Tensor, Injection]]:
    """Apply the method to single layers of every kind. For each kind that the method accepts, yield the name of the
    kind, the host with the layer, the host's output before, and the injection."""
    accepted = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        holders = list(zoo())
    for name, holder in holders:
        holder.double().eval()
        if holder.example.is_floating_point():
            holder.example = holder.example.double()
        base = holder().detach()
        try:
            arguments = {**case.batches(lambda host: host(), {"x": holder.example}), **case.settings, **changes}
            injection = peftcore.apply(holder, case.method, target="layer", dtype="float64", **arguments)
        except (TargetError, UnsupportedSite):
            continue
        accepted += 1
        case.tell(holder)
        yield name, holder, base, injection
    if not accepted:
        raise NotApplicable(f"{case.method.name} acts on none of the layers of torch alone")


@check(
    "on every kind of layer that a method accepts, a fresh adapter leaves the output unchanged",
    cause="the formula holds for matrices only: kernels, groups or overlapping patches are left out",
    remedy="build on `site.kernel` and `self.layer`, which know the layer; raise UnsupportedSite for what the idea "
    "does not fit",
    when=_promises_identity,
    hosts=("mlp",),
)
def every_kind_of_layer_starts_unchanged(case: Case) -> None:
    for name, holder, base, _ in adapted_zoo(case, **_identity_options(case)):
        case.expect_close(holder(), base, f"{name}: a fresh adapter's output")


@check(
    "on every kind of layer, what the operator computes is what its effective weight computes",
    cause="`forward` leaves out stride, dilation or padding, or `merged` lays out kernel or rows differently",
    remedy="apply factors with `self.layer.apply` and `self.layer.add`; weights in `merged` are [*batch, out, in, "
    "*kernel]",
    when=lambda tags: tags.mergeable,
    hosts=("mlp",),
)
def every_kind_of_layer_equals_its_effective_weight(case: Case) -> None:
    for name, holder, base, injection in adapted_zoo(case):
        fill(injection)
        adapted = holder().detach()
        case.expect_moved(adapted, base, f"{name}: the filled adapter's output")
        injection.merge(keep=None)
        case.expect_close(holder(), adapted, f"{name}: output through the effective weight", factor=10)


@check(
    "plan() tells what apply() then does",
    cause="`inject`, the operator or `trainable` decides by values, or does something else on the meta device",
    remedy="decide by shapes and options alone: `site.weight_shape`, `site.in_features`, `config`",
)
def a_plan_comes_true(case: Case) -> None:
    model, _ = case.fresh()
    plan = planned(case, model)
    injection = case.apply(model)
    state = injection.state_dict()
    case.expect([s.path for s in plan.sites] == [s.path for s in injection.sites], "other sites than planned")
    case.expect(plan.shapes == {key: tensor.shape for key, tensor in state.items()}, "other tensors than planned")
    held = sum(parameter.numel() for parameter in injection.parameters())
    trained = sum(parameter.numel() for parameter in injection.parameters() if parameter.requires_grad)
    case.expect(plan.parameters == held, f"{plan.parameters} parameters planned, {held} there")
    case.expect(plan.trainable == trained, f"{plan.trainable} trainable parameters planned, {trained} train")
    case.expect(plan.bytes == sum(t.numel() * t.element_size() for t in state.values()), "another size than planned")


@check(
    "plan() changes nothing",
    cause="`inject` changes the host itself instead of recording with the surgeon's verbs",
    remedy="change it by `surgeon.graft`, `own` and `replace` only: a plan records what they say, and does not do it",
)
def a_plan_changes_nothing(case: Case) -> None:
    model, inputs = case.fresh()
    base, before = case.quiet(model, inputs), trace(model)
    planned(case, model)
    case.expect(not (wrong := differences(before, trace(model))), f"other than before: {wrong}")
    case.expect_equal(case.quiet(model, inputs), base, "the output")


@check(
    "a host on the meta device can be planned, with the same result",
    cause="values of the host are read from `site.module`, or a Python number is made of them",
    remedy="read with `site.weight()`, which has a shape alone while planning, and keep what comes of it a tensor",
)
def a_host_without_memory_can_be_planned(case: Case) -> None:
    model, _ = case.fresh()
    real = planned(case, model)
    there = planned(case, model.to("meta"))
    case.expect(
        there.shapes == real.shapes and there.trainable == real.trainable, "another plan than for the real host"
    )


@check(
    "a failed injection leaves the host as it was, to the bit: at the first operator, the last, and after the surgery",
    cause="`inject` sets something on the host, and takes it back at its end only",
    remedy="record with the surgeon's verbs, which are undone; what must be known later belongs on the operator",
)
def a_failed_injection_leaves_no_trace(case: Case) -> None:
    model, inputs = case.fresh()
    last = len(planned(case, model).sites) - 1
    base, before = case.quiet(model, inputs), trace(model)
    for stop in (0, last, None):
        failing = replace(case, method=interrupted(case.method, stop))
        with raises(case, Interrupted, f"apply() whose operator {stop} cannot be built"):
            failing.apply(model)
        case.expect(
            not (wrong := differences(before, trace(model))), f"failed at operator {stop}; other than before: {wrong}"
        )
        case.expect_equal(case.quiet(model, inputs), base, "the output after a failed injection")


@check(
    "a target that matches nothing, or is excluded altogether, is a TargetError raised before anything changes",
    cause="`inject` changes the host before it asks the surgeon for sites",
    remedy="call `surgeon.sites()` first, and change the host by the surgeon's verbs alone",
)
def unmatched_targets_change_nothing(case: Case) -> None:
    model, _ = case.fresh()
    before = trace(model)
    for wish in ({"target": "nowhere"}, {"target": "re:nowhere.*"}, {"target": "*", "exclude": "*"}):
        with raises(case, TargetError, f"apply(model, ..., {wish})"):
            case.apply(model, **wish)
        case.expect(not (wrong := differences(before, trace(model))), f"{wish}: other than before: {wrong}")


def _main_modules(case: Case, injection: Injection) -> list[str]:
    """Return the paths of the modules that the target has selected and that have operators."""
    grafted = {site.module_path for site in injection.sites}
    return list(dict.fromkeys(s.module_path for s in injection.main_selection if s.module_path in grafted))


def _addressable(case: Case, model: nn.Module) -> str:
    """Return the path of the last module of the default target that can be targeted by its path. The output of an
    attention, for example, can be targeted only by its role."""
    injection = case.apply(model)
    modules = _main_modules(case, injection)
    injection.remove()
    case.expect(bool(modules), "the method never asked for the sites of the user's target")
    for path in reversed(modules):
        with contextlib.suppress(UnsupportedSite):
            planned(case, model, target=[path])
            return path
    raise NotApplicable("the method acts on outputs that have a role but no path of their own")


@check(
    "`target` decides where a method acts, however it is written",
    cause="`inject` picks modules by itself, or takes some besides those that `surgeon.sites()` gives",
    remedy="graft where `surgeon.sites()` says; a place of its own must not be one that the default target names",
)
def the_target_decides(case: Case) -> None:
    model, _ = case.fresh()
    wanted = _addressable(case, model)
    default = case.apply(model)
    others = set(_main_modules(case, default)) - {wanted}
    default.remove()
    forms: list[Any] = [f"re:{wanted}".replace(".", r"\."), [wanted], lambda path, module: path == wanted]
    sites = []
    for form in forms:
        injection = case.apply(model, target=form)
        sites.append([site.path for site in injection.sites])
        case.expect(
            _main_modules(case, injection) == [wanted], f"target={form!r} gave {_main_modules(case, injection)}"
        )
        besides = others.intersection(site.module_path for site in injection.sites)
        case.expect(not besides, f"target={form!r} gave {', '.join(sorted(besides))} besides")
        injection.remove()
    case.expect(all(each == sites[0] for each in sites), f"different sites for the same target: {sites}")


@check(
    "a target that matches in part is a TargetError that names what matches nothing",
    cause="`inject` catches the error, or finds modules without the surgeon",
    remedy="let `surgeon.sites()` raise: no handler around it, no search of your own",
)
def partly_unmatched_targets_are_refused(case: Case) -> None:
    model, _ = case.fresh()
    target = [_addressable(case, model), "nowhere"]
    with raises(case, TargetError, f"apply(model, ..., target={target})", names="nowhere"):
        case.apply(model, target=target)


@check(
    "modules of the host that are called like the method are ordinary modules",
    cause="own modules are recognized by a part of their name",
    remedy="look at no names: `surgeon.sites()` leaves out operators, which it knows by class",
)
def modules_named_like_the_method_are_ordinary(case: Case) -> None:
    counts = []
    for name in ("net", case.method.name):
        model, inputs = case.fresh()
        wrapper = Wrapper(name, model)
        injection = case.filled(wrapper)
        case.expect(bool(torch.isfinite(case.quiet(wrapper, inputs)).all()), "the wrapped host's output is not finite")
        counts.append([site.path.removeprefix(f"{name}.") for site in injection.sites])
    case.expect(counts[0] == counts[1], f"{len(counts[1])} sites instead of {len(counts[0])}")


@check(
    "an adapter's start depends on the seed and the path alone, not on other sites or the global generator",
    cause="random numbers are drawn outside the operator's `__init__`, or depend on the order of sites",
    remedy="draw in `__init__` from torch's generator, which is seeded for each site; count nothing, bring no "
    "generator",
)
def the_start_depends_on_seed_and_path(case: Case) -> None:
    model, _ = case.fresh()
    torch.manual_seed(5)
    first = case.apply(model, seed=3)
    start = {key: tensor.clone() for key, tensor in first.state_dict().items()}
    modules = _main_modules(case, first)
    first.remove()
    torch.manual_seed(6)
    alone = case.looks_at_data or len(modules) == 1  # what data says may speak of all sites together
    for wish in ({}, {} if alone else {"exclude": modules[0]}):
        injection = case.apply(model, seed=3, **wish)
        for key, tensor in injection.state_dict().items():
            case.expect_equal(tensor, start[key], f"{key} at the start, with {wish or 'the same seed'}")
        injection.remove()


@check(
    "injecting does not move the global generator",
    cause="random numbers are drawn in `trainable`",
    remedy="draw where the surgeon builds, which seeds and restores: in the operator's `__init__`, or in what "
    "`surgeon.own` makes",
)
def the_global_generator_stays(case: Case) -> None:
    model, _ = case.fresh()
    before = torch.random.get_rng_state()
    case.apply(model)
    case.expect_equal(torch.random.get_rng_state(), before, "the state of the global generator")


@check(
    "operators have the dtype that was asked for, float32 by default",
    cause="a tensor is a plain attribute, which moves with nothing",
    remedy="make it a parameter, or a buffer (`persistent=False` where no file needs it)",
)
def operators_have_the_asked_dtype(case: Case) -> None:
    for asked, dtype in ((None, torch.float32), ("bfloat16", torch.bfloat16)):
        model, _ = case.fresh(torch.bfloat16)
        injection = case.apply(model, dtype=asked)
        for path, operator in injection.modules():
            tensors = [*operator.parameters(), *operator.buffers()]
            tensors += [v for module in operator.modules() for v in vars(module).values() if isinstance(v, Tensor)]
            wrong = {tensor.dtype for tensor in tensors if tensor.is_floating_point()} - {dtype}
            case.expect(not wrong, f"dtype={asked}: a tensor of {path} has {wrong}")


@check(
    "every parameter has a dimension, since FSDP2 shards along the first",
    cause="a scalar parameter: `torch.zeros(())`",
    remedy="make it `torch.zeros(1)`",
)
def parameters_have_a_dimension(case: Case) -> None:
    for options in ({}, case.tags.identity_options or {}):
        model, _ = case.fresh()
        for path, operator in case.apply(model, **options).modules():
            scalars = [name for name, parameter in operator.named_parameters() if not parameter.dim()]
            case.expect(not scalars, f"scalars in {path}: {', '.join(scalars)}")


@check(
    "an adapter on a module that is never called is an error at the first forward, not a silence",
    cause="the method marks the graft as having run, or acts by hooks instead of operators",
    remedy="act in the operator's `forward` alone: that is what the graft counts",
    hosts=("mlp", "llama"),
)
def sites_that_never_run_are_reported(case: Case) -> None:
    model, inputs = case.fresh()
    host = Unused(model)
    try:
        peftcore.plan(host, case.method, target=["unused"], **case.settings)
    except UnsupportedSite as refused:
        raise NotApplicable(f"refused: {refused}") from None
    with raises(case, InactiveSite, "the first forward"):
        case.apply(host, target=["unused"])  # a method that looks at data runs the host here already
        case.quiet(host, inputs)


@check(
    "the output projection of nn.MultiheadAttention, which is read and never called, is adapted or refused",
    cause="`merged` passes over tensors that it does not know by name",
    remedy="treat every weight alike, by its shape; raise UnsupportedSite for what the idea does not fit",
    hosts=("encoder",),
)
def the_attention_output_projection_is_no_silent_noop(case: Case) -> None:
    model, inputs = case.fresh()
    base = case.quiet(model, inputs)
    try:
        case.filled(model, target="*.out_proj")
    except (TargetError, UnsupportedSite) as refused:
        raise NotApplicable(f"refused: {refused}") from None
    case.expect_moved(case.quiet(model, inputs), base, "the output with an adapter on out_proj alone")


@check(
    "the work of injecting does not grow with the number of adapters that are there already",
    cause="`inject` walks over `model.modules()`, operators of other injections included",
    remedy="go over `surgeon.sites()`, and search the model for nothing else",
    hosts=("mlp", "encoder"),
)
def injecting_costs_the_same_each_time(case: Case) -> None:
    model, _ = case.fresh()
    work = []
    for index in range(12):
        peftcore.activate(model)
        with counted_calls() as count:
            case.apply(model, name=f"number{index}")
        work.append(count[0])
    # Before a look at data the whole model is put into evaluation, with the operators that are there.
    bound = 1.3 if case.tags.needs_data else 1.2
    case.expect(work[-1] < bound * work[1], f"{work[1]} calls for the second adapter, {work[-1]} for the twelfth")
