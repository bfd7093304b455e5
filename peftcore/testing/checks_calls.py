"""Checks of calls of the model: batches whose rows use different injections, recomputation in backward with the same
active adapters as in the forward, and generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftcore
from peftcore.errors import MissingContext, RouteError
from peftcore.forward.choice.active_adapters import Route
from peftcore.forward.state.host_state import state_of
from peftcore.injection.injection import Injection
from peftcore.testing.checks_training import backward, expect_same_gradients, gradients_of, loss
from peftcore.testing.kit import TOLERANCES, Case, NotApplicable, check
from peftcore.testing.tools import Counts, raises

GENERATORS = ("llama", "gpt2", "t5", "moe", "mistral")


def _two(case: Case, shallow: bool = False) -> tuple[nn.Module, Mapping[str, Any], list[Injection]]:
    """Build a model with two inactive injections of the method, whose tensors are filled with noise."""
    model, inputs = case.shallow() if shallow else case.fresh()
    injections = [case.filled(model, seed=seed, name=name) for seed, name in ((1, "one"), (5, "two"))]
    peftcore.activate(model)
    return model, inputs, injections


def _names(inputs: Mapping[str, Any]) -> list[str | None]:
    rows = max(len(value) for value in inputs.values() if isinstance(value, Tensor))
    return [(None, "two", "one")[row % 3] for row in range(rows)][::-1]


def _separately(case: Case, model: nn.Module, inputs: Mapping[str, Any], names: Sequence[str | None]) -> Tensor:
    rows = []
    for row, name in enumerate(names):
        with peftcore.activate(model, *([] if name is None else [name])):
            rows.append(case.run(model, inputs)[row])
    return torch.stack(rows)


def _routable(model: nn.Module, names: Sequence[str | None]) -> Any:
    """Return a context manager that routes the rows of a batch to these injections.

    Raises:
        NotApplicable: at the method's default sites in this host, rows of a batch cannot be distinguished.
    """
    try:
        return peftcore.route(model, names)
    except RouteError as error:
        raise NotApplicable(str(error)) from None


@check(
    "rows of a batch that go to different injections equal separate passes, in training and evaluation",
    cause="an operator mixes rows, or reads which injections are active",
    remedy="act on each row by itself; a method that cannot is declared with `per_row=False`",
    when=lambda tags: tags.per_row,
)
def routed_rows_equal_separate_passes(case: Case) -> None:
    model, inputs, injections = _two(case)
    names = _names(inputs)
    expected = _separately(case, model, inputs, names)
    loss(expected).backward()  # type: ignore[no-untyped-call]
    gradients = [gradients_of(injection) for injection in injections]
    model.zero_grad()
    with _routable(model, names):
        routed = case.run(model, inputs)
        quiet = case.quiet(model, inputs)
    case.expect_moved(expected, case.run(model, inputs), "the rows")
    case.expect_close(routed, expected, "routed rows")
    case.expect_close(quiet, expected, "routed rows without gradients")
    loss(routed).backward()  # type: ignore[no-untyped-call]
    for injection, wanted in zip(injections, gradients, strict=True):
        if any(gradient.abs().max() > 0 for gradient in wanted.values()):
            expect_same_gradients(case, gradients_of(injection), wanted, f"routed, {injection.name}")


@check(
    "a step with several injections costs what a step of each with its own rows costs, in training and evaluation",
    cause="an operator works on rows that are not its own: on what it finds in `forward_context()`, or by running its "
    "module once more",
    remedy="work on what `forward` is given; what a call told, taps hold and the model was given are those of its rows",
    when=lambda tags: tags.per_row,
)
def each_pays_for_its_own_rows(case: Case) -> None:
    model, inputs, _ = _two(case)
    named = _names(inputs)
    for training in (True, False):
        names = [name or "one" for name in named] if training else named  # what nothing trains has no backward
        with _routable(model, names):
            together = _flops(case, model, inputs, training)
        apart = 0
        for name in dict.fromkeys(names):
            own = torch.tensor([row for row, each in enumerate(names) if each == name])
            rows = {
                key: value.index_select(0, own) if isinstance(value, Tensor) and len(value) == len(names) else value
                for key, value in inputs.items()
            }
            with peftcore.activate(model, *([] if name is None else [name])):
                apart += _flops(case, model, rows, training)
        how = "training" if training else "evaluation"
        case.expect(
            together <= SURPLUS * apart, f"in {how} {together:,} operations, where rows by themselves take {apart:,}"
        )


SURPLUS = 1.03
"""The largest accepted cost of a step whose rows use several injections, relative to the cost of a separate step for
each injection."""


def _flops(case: Case, model: nn.Module, inputs: Mapping[str, Any], training: bool) -> int:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # what it does nobody counts
    try:
        case.quiet(model, inputs)  # what is planned once is no part of a step
        with Counts() as counted:
            if training:
                loss(case.run(model, inputs)).backward()  # type: ignore[no-untyped-call]
            else:
                case.quiet(model, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    model.zero_grad()
    flops: int = counted.flops
    return flops


@check(
    "a method that cannot tell rows apart refuses to be routed, and none refuses without need",
    cause="`per_row=False` is declared, but rows route well",
    remedy="take the tag away",
    when=lambda tags: not tags.per_row,
)
def routing_is_refused_where_rows_mix(case: Case) -> None:
    model, inputs, _ = _two(case)
    names = _names(inputs)
    with raises(case, RouteError, "route()"):
        peftcore.route(model, names)
    expected = _separately(case, model, inputs, names)
    state = state_of(model)
    assert state is not None
    places = tuple([-1 if name is None else ("one", "two").index(name) for name in names])
    try:
        state.choices.set(replace(state.choice, route=Route(("one", "two"), torch.tensor(places), positions=places)))
        forced = case.run(model, inputs)
    except (RuntimeError, TypeError, NotImplementedError, MissingContext):
        return
    error = (forced - expected).abs().max().item() / max(expected.abs().max().item(), 1e-3)
    case.expect(error > TOLERANCES[expected.dtype], "rows route well, so per_row=False claims too little")


@check(
    "a choice of injections that is left before backward still counts where layers are computed again",
    cause="an operator looks at the host's state, or at something of its own, instead of the call's",
    remedy="read `forward_context()`, which is the forward's own when a layer is computed again",
)
def backward_repeats_the_choice_of_its_forward(case: Case) -> None:
    model, inputs, (one, two) = _two(case)
    with peftcore.activate(model, "two"):
        _, expected = backward(case, model, inputs, two)
    for reentrant in (False, True):
        model.zero_grad()
        trigger = torch.zeros((), requires_grad=True)
        with peftcore.activate(model, "two"):
            output: Tensor = checkpoint(lambda _: case.run(model, inputs), trigger, use_reentrant=reentrant)
        with peftcore.activate(model, "one"):
            loss(output).backward()  # type: ignore[no-untyped-call]
        expect_same_gradients(case, gradients_of(two), expected, f"left before backward, reentrant={reentrant}")
        stray = [name for name, gradient in gradients_of(one).items() if gradient.abs().max() > 0]
        case.expect(not stray, f"reentrant={reentrant}: the other injection got gradients: {', '.join(stray[:3])}")


@check(
    "any assignment of rows to the same injections runs in one compiled graph",
    cause="an operator reads the values of the route (`.item()`, `.tolist()`, a Python `if`)",
    remedy="leave rows to the core, or index by the route as a tensor",
    when=lambda tags: tags.per_row,
    hosts=("llama", "mlp"),
    cost="slow",
)
def assignments_share_a_compiled_graph(case: Case) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    model, inputs, _ = _two(case, shallow=True)
    names = _names(inputs)
    with _routable(model, names):
        case.quiet(model, inputs)
    counter = CompileCounterWithBackend("eager")  # graphs are counted here; compiled_equals_eager differentiates them
    torch.compiler.reset()
    model.compile(backend=counter, fullgraph=True)
    frames, eager = [], type(model).forward
    for turned in (names, names[1:] + names[:1]):
        with torch.no_grad(), peftcore.route(model, turned):
            routed = case.run(model, inputs)
            frames.append(counter.frame_count)
            expected = case.host.output(eager(model, **inputs))
        case.expect_close(routed, expected, f"rows {turned}, compiled", factor=10)
    torch.compiler.reset()
    case.expect(frames[0] == frames[1], f"{frames[0]} graphs for one assignment, {frames[1]} for two")


@check(
    "generation with and without a cache gives the same tokens",
    cause="what a token gets depends on how many tokens are in the same pass",
    remedy="act on each position by itself; rows in front of the tokens are for a `SequenceOperator` or an "
    "`AttentionOperator`",
    hosts=GENERATORS,
)
def generation_does_not_depend_on_the_cache(case: Case) -> None:
    model, inputs = case.fresh()
    given = {"input_ids": inputs["input_ids"], "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    base = model.generate(**given)  # type: ignore[operator]
    case.filled(model)
    cached, uncached = (model.generate(**given, use_cache=use) for use in (True, False))  # type: ignore[operator]
    case.expect(cached.shape == base.shape, f"{tuple(cached.shape)} tokens come out where the base gives {base.shape}")
    case.expect_equal(cached, uncached, "tokens generated with a cache, and without")


WAYS: dict[str, dict[str, Any]] = {
    "padding on the left": {},
    "a static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 2},
}


@check(
    "padding on the left, static caches and beams: generation gives what it gives without a cache",
    cause="an operator takes positions, masks or rows from somewhere else than the forward that runs",
    remedy="read them from `forward_context().inputs`, and count on no number of rows or tokens",
    hosts=GENERATORS,
)
def generation_in_other_ways_does_not_depend_on_the_cache(case: Case) -> None:
    model, inputs = case.fresh()
    case.filled(model)
    given = {name: inputs[name].flip(1) for name in ("input_ids", "attention_mask")}
    for name, way in WAYS.items():
        common = {**given, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, **way}
        uncached = {key: value for key, value in common.items() if key != "cache_implementation"}
        expected = model.generate(**uncached, use_cache=False)  # type: ignore[operator]
        case.expect_equal(model.generate(**common, use_cache=True), expected, f"tokens with {name}")  # type: ignore[operator]
