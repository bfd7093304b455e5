"""Switching: `activate`, `route` and `call` choose the active injections of a model, until the next choice or the end
of a block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from peftcore.contract.compositions import Composition, Stack
from peftcore.errors import MergeError, RouteError
from peftcore.forward.active_adapters import Choice, Route
from peftcore.forward.host_state import Chosen, HostState, chosen, known, state_of


def activate(model: nn.Module, *names: str | Composition) -> Chosen:
    """Make exactly these injections act, in the order in which they were applied; no names: the bare base model.
    Compositions (`Stack`, `Sum`, `Average`, `Split`, `Fuse`) differ; names given with them stack in the order given.

    Applies at once. The result is also a context manager that restores the earlier choice:

        with activate(model, "summarize"):
            model.generate(...)

    Called in the thread that adapted the host, it holds for all threads that did not choose for themselves; in any
    other thread it holds for that thread alone (use the context manager there). Frozen and trainable parameters stay as
    they are.

    Raises:
        UnknownInjection: the host has no injection of such a name.
        CompositionError: an injection's outputs cannot be combined with those of others.
        MergeError: an injection in a composition is merged.
    """
    plain = [name for name in names if isinstance(name, str)]
    if len(plain) == len(names):
        return chosen(known(model, plain), plain)
    composition = names[0] if len(names) == 1 and isinstance(names[0], Composition) else Stack(*names)
    state = known(model, composition.names())
    wanted = set(composition.names())
    active = tuple(name for name in state.injections if name in wanted)
    for name in active:
        if state.injections[name].merged:
            raise MergeError(f"{name!r} is merged and acts in all branches; unmerge() it before composing")
    for name in composition.combined():
        state.injections[name].check_combinable()
    return Chosen(state, Choice(active, None, state.now().context, composition))


def route(model: nn.Module, names: Sequence[str | None], *, copies: int = 1) -> Chosen:
    """Let a different injection act on each row of the batch.

    Best as a context manager, round forward or generate:

        with route(model, ["summarize", None, "translate"]):
            model(**batch_of_three)

    Row by row the outputs equal separate passes. Any assignment of the same names shares one compiled graph. Holds for
    threads as `activate` does.

    Args:
        model: the host.
        names: one for each row of the batch; None for the bare base model.
        copies: how many rows stand for one of these where `generate` repeats rows (``num_beams``).

    Raises:
        UnknownInjection: the host has no injection of such a name.
        RouteError: a named injection cannot tell rows apart in this host, or (in forward) the batch has another length.
        MergeError: a named injection is merged, so it would act on every row.
    """
    wanted = [name for name in names if name is not None]
    state = known(model, wanted)
    if not names:
        raise RouteError("a route names one injection (or None) for each row; it got no rows")
    used = tuple(name for name in state.injections if name in set(wanted))
    for name in used:
        if state.injections[name].merged:
            raise MergeError(f"{name!r} is merged and acts on every row; unmerge() it before routing")
        state.injections[name].check_routable()
    positions = [-1 if name is None else used.index(name) for name in names]
    device = next((parameter.device for parameter in model.parameters()), None)
    routed = Route(used, torch.tensor(positions, device=device), copies, tuple(positions))
    return Chosen(state, replace(state.now(), route=routed, composition=None))


def call(model: nn.Module, **context: Any) -> Chosen:
    """Give methods values for which forward has no argument: a task, a timestep.

    Best as a context manager, round forward or generate; values given before stay unless they are given anew:

        with call(model, task="rte"):
            model(**batch)
    """
    state = state_of(model) or HostState()
    now = state.now()
    return Chosen(state, replace(now, context={**now.context, **context}))
