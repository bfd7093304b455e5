"""Records a host's forwards. Two hooks on the root module open and close a context for each forward. If a layer runs
again inside backward, it finds the context of the forward that it repeats."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftcore.errors import AmbiguousBackward, RouteError
from peftcore.forward.context.activation_checkpoints import remembered
from peftcore.forward.context.context import (
    HERE,
    ForwardContext,
    announce,
    batch_sizes,
    drop_interrupted,
    graph_task,
    outside,
    repeating,
)
from peftcore.forward.state.own_losses import Fate, OwnLosses, output_losses

if TYPE_CHECKING:
    from peftcore.forward.choice.active_adapters import Choice, Route
    from peftcore.forward.state.host_state import HostState


class Recorder:
    """Opens a `ForwardContext` when the host starts and closes it when the host returns or fails."""

    def __init__(self) -> None:
        self.recent: list[Choice] = []
        """The choices of active adapters in the forwards since the last backward: only the last two different ones."""
        self.drained = False
        self.losses = OwnLosses()

    def enter(self, state: HostState, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Choice | None:
        """Open a context before the host runs. Returns the forward's choice of active adapters; None while
        torch.compile traces."""
        call = ForwardContext(state, None, model, args, kwargs)
        if not torch.compiler.is_compiling():
            drop_interrupted()
            call.frame = sys._getframe(2)  # torch's, which called the hook
        HERE.calls.append(call)  # before anything can raise: `leave` comes in any case
        if torch.compiler.is_compiling():
            call.choice = state.now()
            state.watches_runs = False  # nothing cannot watch compiled code, where a checkpoint must not leave marks
            return None
        HERE.calm = None
        call.choice = choice = state.now()
        call.listed = True
        state.running[id(call)] = call
        state.check_ready(choice)
        state.check(choice)
        if HERE.outside is not None:
            HERE.outside = None
            state.outside.pop(HERE.token, None)
        if state.watched is not None:
            state.watched.begin(model, state, choice.acting)
        if choice.route is not None:
            _check_rows(call, choice.route)
        if HERE.generating or state.reads_tokens or (choice.route is not None and choice.route.since is not None):
            call.count_tokens()
        if not repeating():  # also without gradients: a reentrant checkpoint round the host runs it so
            self.note(choice)
            HERE.calm, call.calm = call, True
            if model.training and torch.is_grad_enabled():
                self.losses.begin(state, choice.acting)
        return choice

    def leave(self, state: HostState, model: nn.Module, kwargs: dict[str, Any], output: Any) -> Any:
        """Close the context after the host ran, also if it raised an exception. Returns the output with the methods'
        losses, or None if the output does not change."""
        if not HERE.calls:
            return None  # tracing failed half-way: nothing was opened here
        call, seen = HERE.calls[-1], []
        learns = output is not None and torch.is_grad_enabled() and model.training
        try:
            if learns:
                seen = output_losses(state, call, output)
        finally:
            call.close()
            HERE.calls.pop()
        if not torch.compiler.is_compiling():
            HERE.settle()
            if output is not None and state.watches_runs and state.watched is not None:
                state.watched.judge(state, model.training)
        if output is None or not torch.is_grad_enabled():
            return None
        if learns:
            output = self.losses.end(state, call, seen, output, kwargs, _fate(state))
        if not torch.compiler.is_compiling():
            announce(output, call)
        return output

    def note(self, choice: Choice) -> None:
        """Record the choice of active adapters of a forward that backward may repeat."""
        if self.drained:
            self.recent, self.drained = [], False
        if self.recent and self.recent[-1] is choice:
            return  # as at nearly every token
        if not any(choice.same(other) for other in self.recent):
            self.recent = [*self.recent[-1:], choice]

    @contextmanager
    def unrepeated(self) -> Iterator[None]:
        """Context manager for forwards that backward never repeats. They are not recorded."""
        recent, drained = self.recent, self.drained
        try:
            yield
        finally:
            self.recent, self.drained = recent, drained

    def visit(self, state: HostState, choice: Choice, training: bool) -> None:
        """Record that an adapted module runs. If the user called a part of the host directly (`forward_features`, or an
        encoder), this opens a context without inputs. It is used until the next forward of the host."""
        if HERE.calls:
            return
        state.check_ready(choice)
        found = outside()
        if found is None or found.state is not state or found.choice is not choice:
            state.check(choice)
            if state.watched is not None and choice.acting:
                state.watched.check(state.injections[choice.acting[0]].model, state, choice.acting)
            found = state.outside[HERE.token] = ForwardContext(state, choice)
            HERE.outside = weakref.ref(found)
        if training and not repeating():
            self.note(choice)
            if torch.is_grad_enabled():
                self.losses.visit(state, found)

    def __getstate__(self) -> dict[str, Any]:
        return {"recent": [], "drained": False, "losses": self.losses}


def _fate(state: HostState) -> Fate:
    """Returns how losses are handled if the output lacks a loss; see `OwnLosses.end`. Inside backward, the first run of
    the forward has stored them ("waited"). If it ran without gradients, in a reentrant checkpoint around the host, they
    are "lost"."""
    if torch.compiler.is_compiling() or not repeating():
        return "wait"
    task, _ = HERE.announced.get(id(state), (-1, None))
    return "waited" if task == graph_task() else "lost"


def _check_rows(call: ForwardContext, route: Route) -> None:
    tensors = {name: value for name, value in call.inputs.items() if isinstance(value, Tensor) and value.dim() > 1}
    sizes = batch_sizes(tensors)
    if sizes and not route.fits(sizes[0]):
        raise RouteError(
            f"the route has {len(route.index)} rows (times {route.copies} copies), but the batch has {sizes[0]}: name "
            "one adapter (or None) for each row, and pass copies=num_beams if generate repeats rows"
        )


def replayed(state: HostState) -> Choice:
    """Returns the choice of active adapters of the forward whose modules now run again inside backward.

    Raises:
        AmbiguousBackward: forwards with different choices ran before this backward, and it is unclear which one is
            repeated. Reasons are a nested reentrant checkpoint, or a loss that was not computed from the host's
            outputs.
    """
    if HERE.calls and (extra := HERE.calls[-1]).extra and extra.state is state and extra.choice is not None:
        return extra.choice
    told = remembered(state)
    if told is not None:
        choice: Choice = told[0]
        return choice
    task, reference = HERE.announced.get(id(state), (-1, None))
    call = None if reference is None else reference()
    if task == graph_task() and call is not None and call.choice is not None:
        return call.choice
    recent, state.recorder.drained = state.recorder.recent, True
    if len(recent) > 1:
        raise AmbiguousBackward(
            "several forwards with different active adapters, routes or contexts ran before this backward, and it is "
            "unclear which one a recomputed layer belongs to: run backward after each forward, or use non-reentrant "
            "checkpointing and compute the loss from the model's output"
        )
    return recent[0] if recent else state.choices.here()
