"""The losses that methods add to the loss of the model's output. If the output lacks a loss, they are stored until
`Injection.losses` returns them.

Methods compute them in `aux_loss`, or from the model's output in `output_loss`. Operators add them with
`ForwardContext.add_loss`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sized
from typing import TYPE_CHECKING, Any, Literal, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from peftcore.contract.installed_methods import Installed
from peftcore.contract.method import Method
from peftcore.errors import RouteError, TrainingError, UnknownInjection
from peftcore.forward.rows.routing import OwnRows, own_rows
from peftcore.layers.fsdp import differentiable
from peftcore.utils.threads import Token, this_thread

if TYPE_CHECKING:
    from peftcore.forward.choice.active_adapters import Active
    from peftcore.forward.context.context import ForwardContext

IGNORED = -100
"""The label that transformers ignores in losses."""
PASSES = 16
"""A limit for parts of the model that the user calls directly, since the end of such a forward is not known. When the
target modules have run this often on average, the losses of their operators count as left out of training."""

logger = logging.getLogger("peftcore")
told: set[str] = set()
"""Names of the methods for which this process has already logged that losses were left out of training."""

Fate = Literal["wait", "waited", "lost"]
Entry = tuple[str, Tensor]
"""A loss, with the name of the injection to which its method or operator belongs."""


class ModelWithLosses(Protocol):
    """The state of a model, as `OwnLosses` needs it."""

    @property
    def injections(self) -> Mapping[str, Installed]:
        """The injections by name."""

    @property
    def slots(self) -> Sized:
        """The slots of the adapted modules."""

    @property
    def outside(self) -> Mapping[Token, ForwardContext]:
        """By thread, the contexts of parts of the model that the user calls directly."""


class OwnLosses:
    """Stores, for each thread, the methods' losses of the last training forward, if they were not added to an output.
    `take` returns them.

    The next training forward with the same injections deletes losses that were not taken. So the activations of at most
    one forward are kept in memory.
    """

    def __init__(self) -> None:
        self._waiting: WeakKeyDictionary[Token, list[Entry]] = WeakKeyDictionary()
        # Compiled code neither knows its thread nor changes a dict that was there before: it sets attributes.
        self._compiled: list[Entry] = []
        self._compiled_waits = False

    def begin(self, state: ModelWithLosses, acting: Active) -> None:
        """Delete the stored losses of the given injections, because their next training forward begins."""
        if self._compiled_waits or this_thread() in self._waiting:
            entries = self._gathered()
            self._keep(entry for entry in entries if entry[0] not in acting)
            notice(state, [entry for entry in entries if entry[0] in acting])

    def end(
        self,
        state: ModelWithLosses,
        call: ForwardContext,
        seen: Iterable[Entry],
        output: Any,
        inputs: Mapping[str, Any],
        fate: Fate,
    ) -> Any:
        """Returns the output of a training forward, with the methods' losses added to its loss. If the output lacks a
        loss, the losses are stored for `take`.

        Args:
            state: the host's state.
            call: the forward's context.
            seen: the losses that `output_losses` returned.
            output: the host's output.
            inputs: the host's arguments by keyword.
            fate: the handling of losses if the output lacks a loss. "wait": store them. "waited": ignore them, because
                backward repeats this forward, and the first run stored them. "lost": log a warning.
        """
        acting = () if call.choice is None else call.choice.acting
        entries = [*operator_losses(state, call), *aux_losses(state, acting), *seen]
        if not entries:
            return output
        inputs = inputs if torch.compiler.is_compiling() else call.inputs  # what was given by position too
        share = share_of_step(inputs)
        if (loss := loss_in(output, inputs)) is not None:
            losses = [own for _, own in entries]
            return with_loss(output, loss + share * sum(losses[1:], losses[0]))
        if torch.compiler.is_compiling():
            if self._compiled_waits:  # nobody took those of the forward before, for which this one is compiled again
                _notice_compiled(*names_of(state, entries))
            self._compiled, self._compiled_waits = [(name, share * own) for name, own in entries], True
        elif fate == "wait":
            self._keep([*self._waiting.get(this_thread(), ()), *((name, share * own) for name, own in entries)])
        elif fate == "lost":
            notice(state, entries)
        return output

    def visit(self, state: ModelWithLosses, call: ForwardContext) -> None:
        """Record that a target module runs in training, in a part of the host that was called directly."""
        call.visits += 1
        if call.visits > PASSES * len(state.slots):
            notice(state, self._of_parts(state))

    def waits(self, state: ModelWithLosses, name: str) -> bool:
        """Whether losses of an injection are stored for this thread."""
        self._keep([*self._gathered(), *self._of_parts(state)])
        return any(name == each for each, _ in self._waiting.get(this_thread(), ()))

    def take(self, state: ModelWithLosses, name: str) -> list[Tensor]:
        """Returns the stored losses of an injection for this thread, with their graph, and deletes them from the
        store."""
        entries = [*self._gathered(), *self._of_parts(state)]
        self._keep(entry for entry in entries if entry[0] != name)
        return [loss for each, loss in entries if each == name]

    def _gathered(self) -> list[Entry]:
        """Returns all losses that are stored for this thread, and deletes them from the store."""
        entries = [*self._waiting.pop(this_thread(), ()), *self._compiled]
        self._compiled, self._compiled_waits = [], False
        return entries

    def _keep(self, entries: Iterable[Entry]) -> None:
        if kept := list(entries):
            self._waiting[this_thread()] = kept

    def _of_parts(self, state: ModelWithLosses) -> list[Entry]:
        """Returns the losses of parts of the model that the user called directly in training, since the last call of
        this method."""
        call = state.outside.get(this_thread())
        if call is None or call.choice is None or not call.visits:
            return []
        call.visits = 0
        return [*operator_losses(state, call), *aux_losses(state, call.choice.acting)]

    def __reduce__(self) -> Any:
        """Copies and pickles contain no losses."""
        return OwnLosses, ()


def operator_losses(state: ModelWithLosses, call: ForwardContext) -> list[Entry]:
    """Returns the losses that operators added in a forward, each with the injection of its operator, and deletes them
    from the context.

    Raises:
        TrainingError: `add_loss` was called with a module that is not an operator of an active injection.
    """
    added, call.losses = call.losses, []
    if not added:
        return []
    acting = () if call.choice is None else call.choice.acting
    owners = {
        id(graft.operator): name for name, injection in acting_injections(state, acting) for graft in injection.grafts
    }
    for operator, _ in added:
        if id(operator) not in owners:
            raise TrainingError(
                f"add_loss received a {type(operator).__name__} that is not an operator at a site of an active "
                "adapter: pass the operator whose forward runs, add_loss(loss, self). If equal operators of several "
                "adapters run as one, set stackable = False on their class"
            )
    return [(owners[id(operator)], loss) for operator, loss in added]


def output_losses(state: ModelWithLosses, call: ForwardContext, output: Any) -> list[Entry]:
    """Returns the losses that methods compute from the output of a forward whose context is still open. With a route,
    each method gets only the rows of its injection.

    Raises:
        RouteError: the forward is compiled, and a route assigns its rows to several adapters.
    """
    choice = call.choice
    route = None if choice is None else choice.route
    found = []
    for name, injection in acting_injections(state, () if choice is None else choice.acting):
        if type(injection.method).output_loss is Method.output_loss:
            continue
        if route is None:
            loss = injection.method.output_loss(injection, output, call)
        else:
            if torch.compiler.is_compiling():
                raise RouteError(
                    f"{name!r} computes a loss from the model's output for its own rows, and compiled code cannot "
                    "separate rows: train it uncompiled, or in separate batches"
                )
            rows = OwnRows(route, (route.names.index(name),), len(route.index) * route.copies)
            with own_rows(rows, "output"):
                loss = injection.method.output_loss(injection, rows.of(output), call)
        found.append((name, loss))
    return [(name, loss) for name, loss in found if loss is not None]


def loss_in(output: Any, inputs: Mapping[str, Any]) -> Tensor | None:
    """Returns the loss in the output of a host; None if the output lacks a loss.

    It is the entry "loss". In a plain tuple, as in transformers, it is a scalar in the first place, if the host was
    called with `return_dict=False` or with labels.

    Args:
        output: the host's output: a mapping, a dataclass or a tuple.
        inputs: the host's arguments by keyword.
    """
    named: Any = output  # by its fields
    if type(output) is tuple:
        labelled = any("label" in name for name, value in inputs.items() if value is not None)
        first = output[0] if output and (labelled or inputs.get("return_dict") is False) else None
        return first if isinstance(first, Tensor) and not first.dim() and first.requires_grad else None
    if isinstance(output, MutableMapping):
        found = output.get("loss")
    elif dataclasses.is_dataclass(output):
        found = named.loss if any(field.name == "loss" for field in dataclasses.fields(output)) else None
    elif isinstance(output, tuple):
        found = named.loss if "loss" in getattr(type(output), "_fields", ()) else None
    else:
        return None
    return found if isinstance(found, Tensor) else None


def with_loss(output: Any, loss: Tensor) -> Any:
    """Returns the host's output with `loss` in place of the loss that `loss_in` found."""
    if isinstance(output, MutableMapping):
        output["loss"] = loss
        return output
    if type(output) is tuple:
        return (loss, *output[1:])
    named: Any = output
    return named._replace(loss=loss) if isinstance(output, tuple) else dataclasses.replace(named, loss=loss)


def acting_injections(state: ModelWithLosses, acting: Active) -> Iterator[tuple[str, Installed]]:
    """Yields the injections with the given names, each with its name.

    Raises:
        UnknownInjection: an injection was removed during the forward.
    """
    for name in acting:
        injection = state.injections.get(name)
        if injection is None:
            raise UnknownInjection(
                f"{name!r} was removed during a forward in which it is active: remove it after the forward"
            )
        yield name, injection


def aux_losses(state: ModelWithLosses, acting: Active) -> Iterator[Entry]:
    """Yields the losses that the methods of the given injections compute in `aux_loss`."""
    for name, injection in acting_injections(state, acting):
        if type(injection.method).aux_loss is not Method.aux_loss:
            with differentiable(injection.model, injection.parameters):  # here it is outside of the blocks
                loss = injection.method.aux_loss(injection)
            if loss is not None:
                yield name, loss


def share_of_step(inputs: Mapping[str, Any], shifted: bool = True) -> Tensor | float:
    """Returns the share of this forward in an optimizer step. Models of transformers receive the number of items in all
    forwards of the step, over all processes, and divide their summed loss by it. The losses of methods are multiplied
    by this share to match.

    Args:
        inputs: the arguments of the forward.
        shifted: whether each token is predicted from earlier tokens. Then the first token of a sequence does not count.
    """
    items, labels = inputs.get("num_items_in_batch"), inputs.get("labels")
    if items is None or not isinstance(labels, Tensor):
        return 1.0
    counted = labels[..., 1:] if shifted and labels.dim() > 1 else labels
    share: Tensor = counted.ne(IGNORED).sum() / items
    return share


def names_of(state: ModelWithLosses, entries: Iterable[Entry]) -> list[str]:
    """Returns the names of the methods to which the losses belong, each once."""
    injections = [state.injections.get(name) for name, _ in entries]
    return list(dict.fromkeys(each.method.name for each in injections if each is not None))


def notice(state: ModelWithLosses, entries: list[Entry]) -> None:
    """Log a warning for each method whose losses were left out of training, with the logger "peftcore". It is logged
    once per method and process."""
    for method in names_of(state, entries):
        _tell(method)


def _tell(method: str) -> None:
    if method not in told:
        told.add(method)
        logger.warning(
            "a loss of %r was left out of training, because the model's output has no loss to add it to. Add "
            "injection.losses() after each forward: loss = criterion(model(x), y) + injection.losses()",
            method,
        )


def _notice_compiled(*methods: str) -> None:
    """Log the warning while torch compiles. Torch runs this once, and does not include it in the compiled code."""
    for method in methods:
        _tell(method)


# As torch.compiler.assume_constant_result does it, which imports the compiler.
_notice_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]
