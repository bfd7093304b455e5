"""Chooses which injections of a model are active. A choice by `activate`, `route` or `call` holds until the next choice
or the end of a block. A choice by `using` holds for one call."""

from __future__ import annotations

import concurrent.futures
import inspect
import operator
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from peftcore.contract.compositions import Composition, Stack, branches
from peftcore.errors import BlockOrderError, ConfigError, MergeError, RouteError
from peftcore.forward.choice.active_adapters import Choice, Route
from peftcore.forward.choice.scopes import Chosen
from peftcore.forward.context.repeats import COPIES, GUIDANCE, told_repeats
from peftcore.forward.state.host_state import HostState, known, state_of
from peftcore.injection.injection import installed

P = ParamSpec("P")
T = TypeVar("T")
Change = Callable[[Choice], Choice]
"""A function that gets a choice and returns an updated one. Parts of the choice that it does not set stay the same."""


def activate(model: nn.Module, *names: str | Composition) -> Chosen:
    """Activate exactly these injections, in the order in which they were applied; without names, the base model runs
    without adapters. Compositions (`Stack`, `Sum`, `Average`, `Split`, `Fuse`) combine injections in other ways; names
    given together with compositions stack in the given order.

    The choice takes effect at once. The result is also a context manager that restores the earlier choice:

        with activate(model, "summarize"):
            model.generate(...)

    A call in the thread that adapted the host chooses for all threads and tasks that have not made a separate choice. A
    call in any other thread chooses for that thread alone. A ``with`` block has the same scope, except in an asyncio
    task: there it holds for that task and the tasks that it starts. Exit blocks in reverse order of entry. If that
    order is not certain, as in generators that run alternately, use `using` instead. Which parameters are trainable
    does not change.

    Raises:
        UnknownInjection: the host has no injection of such a name.
        CompositionError: an injection's outputs cannot be combined with those of other injections, or the effect of one
            would be lost, since another one replaces the same tensor.
        MergeError: an injection in a composition is merged.
        BlockOrderError: at the end of a block, one that was entered later is still open.
    """
    return _now(*_activating(model, names))


def route(
    model: nn.Module,
    names: Sequence[str | None],
    *,
    copies: int = 1,
    since: Sequence[int] | None = None,
    seeds: Mapping[str, int] | None = None,
) -> Chosen:
    """Use a different injection for each row of the batch.

    Best used as a context manager around forward or generate:

        with route(model, ["summarize", None, "translate"]):
            model(**batch_of_three)

    The outputs of each row equal those of a separate pass. All assignments of the same names share one compiled graph.
    The route holds for the same threads and tasks as a choice by `activate`.

    Args:
        model: the host.
        names: one for each row of the batch; None for the base model without adapters.
        copies: how many rows each name applies to, if `generate` repeats rows (``num_beams``).
        since: for each row, the position of the first token on which its injection acts. Padding and cached tokens are
            counted. Earlier tokens, and their entries in a cache, are bit-identical to those of the base model. Works
            only for injections at modules that process each token independently.
        seeds: a seed for each injection name, for its random draws (dropout). The draws for its rows then equal those
            of a pass with these rows alone and the same seed. Use a new seed for each forward, since torch's generators
            are not advanced. Compiled code, and rows without a seed, draw from torch's generators.

    Raises:
        UnknownInjection: the host has no injection of such a name.
        RouteError: a named injection cannot distinguish rows in this host, or (with `since`) tokens; or (in forward)
            the batch has another length.
        MergeError: a named injection is merged, so it would act on every row.
        BlockOrderError: at the end of a block, one that was entered later is still open.
    """
    return _now(*_routing(model, names, copies, since, seeds or {}))


def call(model: nn.Module, *, guidance: bool | int | None = None, copies: int | None = None, **context: Any) -> Chosen:
    """Pass values to methods, such as a task, a timestep or a picture, if the model's forward lacks arguments for them.

    Best used as a context manager around forward or generate. Values from earlier calls stay, unless they are passed
    again:

        with call(model, task="rte"):
            model(**batch)

    A value can have one entry for each row of the batch, or a single entry for all rows. If the batch contains several
    rows for each entry, pass `guidance` or `copies`, which apply to all values of this call. They are not needed if
    the model's ``generate`` repeats the rows:

        with call(unet, condition=pictures, guidance=True):  # [without text, with text], as pipelines of diffusers do
            pipeline(prompts)

    The values hold for the same threads and tasks as a choice by `activate`.

    Args:
        model: the host.
        guidance: True if the batch contains all rows twice, one copy after the other, for classifier-free guidance. For
            more copies, pass their number.
        copies: the number of adjacent rows for each entry (``num_images_per_prompt``, ``num_beams``). With `guidance`,
            it is counted within one copy of all rows.
        context: values for methods.

    Raises:
        ConfigError: `guidance` or `copies` is not a valid number.
    """
    state = state_of(model) or HostState()
    return Chosen(state, _telling(_with_repeats(context, guidance, copies))(state.now()))


def using(
    model: nn.Module,
    *adapters: str | Composition | Sequence[str | None] | None,
    copies: int = 1,
    since: Sequence[int] | None = None,
    guidance: bool | int | None = None,
    **context: Any,
) -> Using:
    """Choose the active adapters for one call only: the form that is safe in every thread, task and generator.

        answer = using(model, "summarize")(model.generate, ids)
        answer = await asyncio.to_thread(using(model, "summarize"), model.generate, ids)
        Thread(target=using(model, "summarize"), args=(model.generate, ids)).start()

    Args:
        model: the host.
        adapters: names and compositions as in `activate`, one list as in `route`, or None for the base model without
            adapters. If omitted, the active adapters stay active and get `context`.
        copies: see `route` and `call`.
        since: see `route`.
        guidance: see `call`.
        context: values for methods, as in `call`.

    Returns:
        A function ``(function, *args, **kwargs)`` that runs ``function(*args, **kwargs)`` and returns its result; it
        can be called many times. To run one step of a generator: ``using(model, "summarize")(next, generator)``.

    Raises:
        ConfigError: neither adapters nor `context` were passed, or a list was passed together with another adapter.
        UnknownInjection, CompositionError, MergeError, RouteError: as by `activate` and `route`; raised by `using` or
            by the later call.
        BlockOrderError: (raised by the later call) the function is a coroutine function or a generator function, whose
            body runs only after the call has returned.
    """
    names = [each for each in adapters if isinstance(each, str | Composition)]
    rows = [tuple(each) for each in adapters if isinstance(each, Sequence) and not isinstance(each, str)]
    context = _with_repeats(context, guidance, copies if copies != 1 and context else None)
    told = _telling(context) if context else None
    if not adapters and told is not None:
        return Using(model, lambda: (state_of(model) or HostState(), None), told)
    if adapters == (None,) or (adapters and len(names) == len(adapters)):
        return Using(model, lambda: _activating(model, names), told)
    if len(adapters) == len(rows) == 1:
        return Using(model, lambda: _routing(model, rows[0], copies, since), told)
    raise ConfigError(
        f"{adapters} does not say which adapters act: pass names and compositions, one list with a name for each row, "
        "or None for the bare base model"
    )


class Using:
    """The result of `using`: runs functions with the chosen adapters active."""

    def __init__(
        self, model: nn.Module, find: Callable[[], tuple[HostState, Change | None]], told: Change | None
    ) -> None:
        self._model, self._find, self._told = model, find, told
        self._made = self._make()

    def __call__(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        made = self._made
        state = made.state
        if (state_of(self._model) or state) is not state or state.removals != made.removals:
            made = self._made = self._make()  # other injections are there
            state = made.state
        before = state.now() if made.change is None else state.choices.around()
        if before is not made.before:  # mostly it is: what is kept for a choice stays valid from call to call
            made = self._made = replace(made, before=before, choice=self._upon(before, made.change))
        _check(state, made.choice)
        with state.choices.held(made.choice, frozenset(threading.enumerate())):
            result = function(*args, **kwargs)
        if _is_yet_to_run(result):
            raise BlockOrderError(
                f"the function returned a {type(result).__name__}, which runs after the call has ended: call each step "
                "of a generator, using(model, name)(next, generator); in a coroutine, wrap the functions that it "
                "calls, or use a block, with peftcore.activate(model, name); pass using(model, name) to executors as "
                "the function"
            )
        return result

    def _make(self) -> _Made:
        state, change = self._find()
        before = state.choices.around()
        return _Made(state, state.removals, change, before, self._upon(before, change))

    def _upon(self, before: Choice, change: Change | None) -> Choice:
        choice = before if change is None else change(before)
        return choice if self._told is None else self._told(choice)


@dataclass(frozen=True, eq=False, slots=True)
class _Made:
    """A cached choice, with the earlier choice from which it was derived and the state for which it is valid."""

    state: HostState
    removals: int
    change: Change | None
    before: Choice
    choice: Choice


def _is_yet_to_run(result: object) -> bool:
    if isinstance(result, concurrent.futures.Future):
        return not result.done()
    return inspect.isgenerator(result) or inspect.isasyncgen(result) or inspect.isawaitable(result)


def _now(state: HostState, change: Change) -> Chosen:
    return Chosen(state, change(state.choices.around()))


def _activating(model: nn.Module, names: Sequence[str | Composition]) -> tuple[HostState, Change]:
    plain = [name for name in names if isinstance(name, str)]
    if len(plain) == len(names):
        composition, state = None, known(model, plain)
        active = state.ordered(plain)
    else:
        composition = names[0] if len(names) == 1 and isinstance(names[0], Composition) else Stack(*names)
        state = known(model, composition.names())
        active = state.ordered(composition.names())
        for name in composition.combined():
            installed(state)[name].check_combinable()
    choice = Choice(active, None, {}, composition)
    _check(state, choice)
    for stack in [active] if composition is None else branches([composition]):
        for slot in [*state.slots] if len(stack) > 1 else ():  # another thread may add some
            slot.check_stack(stack)
    if composition is not None:
        for slot in [*state.slots]:
            slot.check_mixed(composition, active)
    return state, lambda before: replace(choice, context=before.context)


def _routing(
    model: nn.Module,
    names: Sequence[str | None],
    copies: int,
    since: Sequence[int] | None,
    seeds: Mapping[str, int] = MappingProxyType({}),
) -> tuple[HostState, Change]:
    wanted = [name for name in names if name is not None]
    state = known(model, [*wanted, *seeds])
    if not names:
        raise RouteError(
            "a route names one injection (or None) for each row, but the list is empty: pass one name for each row"
        )
    starts = None if since is None else tuple(operator.index(start) for start in since)
    if starts is not None and (len(starts) != len(names) or min(starts) < 0):
        raise RouteError(
            f"since={since!r} needs one column for each of the {len(names)} rows: 0, or the number of first tokens "
            "that run the bare base model"
        )
    used = state.ordered(wanted)
    positions = [-1 if name is None else used.index(name) for name in names]
    device = next((parameter.device for parameter in model.parameters()), None)
    drawn = tuple(seeds.get(name) for name in used) if seeds else ()
    routed = Route(used, torch.tensor(positions, device=device), copies, tuple(positions), starts, seeds=drawn)
    _check(state, Choice((), routed))
    for name in used:
        installed(state)[name].check_routable(by_tokens=starts is not None)
    return state, lambda before: replace(before, route=routed, composition=None)


def _with_repeats(context: Mapping[str, Any], guidance: bool | int | None, copies: int | None) -> dict[str, Any]:
    """Returns the values for methods, with entries that say how often the batch repeats each row (`guidance`,
    `copies`)."""
    said = {name: value for name, value in ((GUIDANCE, guidance), (COPIES, copies)) if value is not None}
    told_repeats(said)
    return {**context, **said}


def _telling(context: Mapping[str, Any]) -> Change:
    return lambda before: replace(before, context={**before.context, **context})


def _check(state: HostState, choice: Choice) -> None:
    """Check that the injections of a choice exist, and that no injection in its route or composition is merged."""
    state.check(choice)
    for name in choice.bound:
        if state.injections[name].merged:
            if choice.route is not None:
                raise MergeError(f"{name!r} is merged and acts on every row; unmerge() it before routing")
            raise MergeError(f"{name!r} is merged and acts in all branches; unmerge() it before composing")
