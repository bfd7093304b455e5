"""Finds the end of a branch: the operations of a block on the branch's output, from the last matrix to the addition to
the hidden states (the stream).

Dropout, layer scale, stochastic depth and norms of a branch's output are modules that are called after the last matrix.
The structure of a model does not show which modules these are: the dropout next to the last matrix drops the hidden
features in T5, and the output of the matrix in GPT-2. The code shows it. So this module reads the source of the
forwards from the last matrix up to the block, and follows the value that the matrix returns through assignments, calls
and methods until it is added to another value. No code runs.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import FunctionType, MethodType
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from peftcore.roles.code_frames import CodeFrame, Value, parameters
from peftcore.roles.source_code import UNKNOWN, definition_of
from peftcore.roles.vocabulary import DROP_PATH_CLASS

Rest = Literal["", "dropout", "scale", "unknown"]
Order = tuple[int, ...]
"""An order of dimensions, as an argument of `Tensor.permute`."""


class State(Enum):
    """The relation of a value in the code to the branch."""

    BRANCH = "branch"  # the last matrix returned it, or it was made of that
    SUM = "sum"  # something else was added to it


_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout}
_SCALES = {"mul", "mul_", "multiply", "multiply_", "div", "div_"}
_SUMS = {"add", "add_"}
_SHAPES = {"reshape", "view", "flatten", "unflatten"}
_CASTS = {"to", "type", "type_as", "float", "half", "bfloat16", "contiguous", "clone"}


@dataclass(frozen=True)
class End:
    """The end of a branch (such as an attention or an MLP): how its output is added to the hidden states (the stream).

    Attributes:
        path: the module after which the branch is added to the stream; None if no module follows the last matrix.
        order: the order of dimensions of that module's output, if the code permutes the branch's output before it.
        drops_path: whether that module is stochastic depth, which drops the branch of whole rows.
        rest: the operations after that module that are code instead of modules: "dropout", "scale" (also by a
            parameter), or "" without any. It is "unknown" if the code cannot be followed, or changes the shape before
            another module.
        entered: the module that is the only reader of the sum of stream and branch (a norm after the branch).
        left: the module that returns the sum, if no other module has read the sum before.
        reader: the first module whose only input is the sum, in any shape (the norm of the next branch).
    """

    path: str | None = None
    order: Order | None = None
    drops_path: bool = False
    rest: Rest = ""
    entered: str | None = None
    left: str | None = None
    reader: str | None = None


def find_end(modules: Mapping[str, nn.Module], last: str, block: str | None, plain: Callable[[nn.Module], type]) -> End:
    """Returns the end of a branch (the point at which its output is added to the hidden states).

    Args:
        modules: the modules of the host by path.
        last: the path of the branch's last matrix, or of the module that reads this matrix.
        block: the path of the block around it; without one, the code is followed up to the host.
        plain: returns the class of a module as the host built it.
    """
    trail, start, left = _Trail(plain), last, None
    while start and start != block and not trail.summed:
        owner = start.rpartition(".")[0]
        while owner and isinstance(modules[owner], nn.ModuleList | nn.ModuleDict):
            owner = owner.rpartition(".")[0]
        returned = trail.through(modules[owner], modules[start])
        if returned is None and not trail.summed:
            trail.rest = "unknown"
            break
        if returned is State.SUM and trail.is_whole():
            left = owner
        start = owner
    path_of = {id(module): path for path, module in modules.items()}
    entered, reader = (None if each is None else path_of[id(each)] for each in (trail.entered, trail.reader))
    if trail.end is None:
        return End(rest=trail.rest, entered=entered, left=left, reader=reader)
    drops = DROP_PATH_CLASS.search(plain(trail.end).__name__.lower()) is not None
    return End(path_of[id(trail.end)], trail.order_there, drops, trail.rest, entered, left, reader)


@dataclass
class _Trail:
    """Follows one value, the output of the last matrix, through the code of forwards, and records what happens to
    it."""

    plain: Callable[[nn.Module], type]
    end: nn.Module | None = None
    """The last module that the value passed through."""
    order: Order | None = None
    order_there: Order | None = None
    reshaped: bool = False
    rest: Rest = ""
    summed: bool = False
    entered: nn.Module | None = None
    reader: nn.Module | None = None
    read: bool = False
    """Whether anything has read the sum."""
    start: nn.Module | None = None

    def through(self, owner: nn.Module, start: nn.Module) -> State | None:
        """Follow the value through the forward of a module; returns the state of the module's output."""
        self.start = start
        if isinstance(owner, nn.Sequential):
            after = list(owner)
            after = after[next(i for i, each in enumerate(after) if each is start) + 1 :]
            for module in after:
                if self.passes(module) is None:
                    return None
            return State.BRANCH
        function = getattr(self.plain(owner), "forward", None)
        tree = definition_of(function)
        if tree is None:
            return None
        names = {**dict.fromkeys(parameters(tree), Value()), tree.args.args[0].arg: Value(owner)}
        return _Frame(self, function, tree, names, self.plain).run().state  # type: ignore[no-any-return]

    def passes(self, module: nn.Module, alone: bool = True) -> State | None:
        """Record a module that is called with the value, and return the state of its output. Returns None if the module
        has matrices or takes other inputs, such as a residual."""
        if not alone:
            self.rest = "unknown"
            return None
        if any(parameter.dim() > 1 for parameter in module.parameters()):
            self.end, self.rest = None, "unknown"  # so it was not the last matrix
            return None
        if self.reshaped:
            idle = isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and not module.p)
            self.rest = self.rest if idle else "unknown"
        else:
            self.end, self.order_there, self.rest = module, self.order, ""
        return State.BRANCH

    def is_whole(self) -> bool:
        """Whether no code has read the sum yet, and the branch was neither permuted nor reshaped before the sum."""
        return not self.read and self.order is None and not self.reshaped

    def add(self) -> State:
        self.summed = True
        return State.SUM

    def permute(self, order: Order) -> None:
        self.order = order if self.order is None else tuple(self.order[dim] for dim in order)


class _Frame(CodeFrame):
    """The names of one function, with the state of each value."""

    question: _Trail
    _kept: tuple[ast.expr, str] | None = None
    """A call, and the name to which its result is assigned."""

    def looped(self, target: ast.expr | None, each: ast.expr | None, body: Callable[[], None]) -> None:
        modules = UNKNOWN if each is None else self.of(each).known
        if target is None or not isinstance(modules, nn.ModuleList | nn.Sequential):
            return body()
        for module in modules:
            self.set(target, Value(module))
            body()

    def assigned(self, target: ast.expr, value: ast.expr) -> Value:
        self._kept = (value, target.id) if isinstance(target, ast.Name) else None
        return self.of(value)

    def operated(self, operation: ast.operator, left: Value, right: Value, sides: tuple[ast.expr, ast.expr]) -> Value:
        states = [left.state, right.state]
        adds = isinstance(operation, ast.Add | ast.Sub)
        if State.SUM in states or State.BRANCH not in states:
            if State.SUM in states and adds:
                return Value(state=State.SUM)
            self._read(states)
            return Value()
        if _joins_tuples(*sides):
            return Value(state=State.BRANCH)
        if adds:
            return Value(state=self.question.add())
        self.question.rest = "scale"
        return Value(state=State.BRANCH)

    def called(
        self, call: ast.Call, callee: Value, owner: Value | None, given: list[Value], named: dict[str, Value]
    ) -> Value:
        return Value(state=self._state(call, callee, owner, given, named))

    def _state(
        self, call: ast.Call, callee: Value, owner: Value | None, given: list[Value], named: dict[str, Value]
    ) -> State | None:
        trail, function = self.question, callee.known
        arguments = [*given, *named.values()]
        states = [each.state for each in arguments if each.state is not None]
        if any(each is trail.start for each in (function, *(value.known for value in given))):
            return State.BRANCH  # also `checkpoint(self.attn, x)`
        if isinstance(function, nn.Module):
            if states != [State.BRANCH]:
                self._enter_sum(function, call, states, len(arguments))
                return None
            return trail.passes(function, alone=len(arguments) == 1)
        if owner is not None and owner.state is not None:
            return self._method(owner.state, call.func.attr, given)  # type: ignore[attr-defined]
        if isinstance(function, FunctionType) and function in _DROPOUTS:
            return self._dropped(states, (given[1] if len(given) > 1 else named.get("p", Value(0.5))).known)
        if isinstance(function, MethodType):
            returned = self.entered(function.__func__, [Value(function.__self__), *given], named, Value())
            return None if returned is None else returned.state
        if isinstance(function, FunctionType) and not function.__module__.startswith("torch."):
            returned = self.entered(function, given, named, Value())
            if states and (returned is None or returned.state is None):
                trail.rest = "unknown"
            return None if returned is None else returned.state
        if State.BRANCH in states:
            trail.reshaped = True
            return State.BRANCH
        if function is torch.clamp:  # which keeps numbers of half precision finite
            return states[0] if states else None
        self._read(states)
        return None

    def _enter_sum(self, module: nn.Module, call: ast.Call, states: list[State], arguments: int) -> None:
        """Record a module that is called with the sum, if no other variable in the code still contains the sum."""
        goes_to = self._kept[1] if self._kept is not None and self._kept[0] is call else None
        kept = any(value.state is State.SUM and name != goes_to for name, value in self.names.items())
        if states == [State.SUM] and arguments == 1 and not kept and self.question.is_whole():
            self.question.entered = module
        if states == [State.SUM] and arguments == 1 and not self.question.read:
            self.question.reader = module
        self._read(states)

    def _read(self, states: Sequence[State | None]) -> None:
        self.question.read = self.question.read or State.SUM in states

    def _method(self, state: State, name: str, given: list[Value]) -> State | None:
        if name in ("size", "dim", "numel"):
            return None
        if state is State.SUM and name in _SHAPES:
            self.question.reshaped = True  # what is made of it is the stream still, but nobody knows how it lies
            return state
        if state is State.SUM and name not in _SUMS | _CASTS:
            self._read([state])
            return None
        if state is State.BRANCH:
            numbers = [each.known for each in given]
            if name in _SUMS:
                return self.question.add()
            if name in _SCALES:
                self.question.rest = "scale"
            elif name == "permute" and numbers and all(isinstance(each, int) and each >= 0 for each in numbers):
                self.question.permute(tuple(numbers))
            elif name not in _CASTS:
                self.question.reshaped = True
        return state

    def _dropped(self, states: list[State], probability: Any) -> State | None:
        if isinstance(probability, int | float) and not probability:
            return states[0] if states else None
        if states == [State.BRANCH]:
            self.question.rest = self.question.rest or "dropout"
        self._read(states)
        return State.BRANCH if states == [State.BRANCH] else None


def _joins_tuples(left: ast.expr, right: ast.expr) -> bool:
    """Whether an addition concatenates tuples: `(hidden,) + outputs[1:]`."""
    return any(
        isinstance(each, ast.Tuple) or (isinstance(each, ast.Subscript) and isinstance(each.slice, ast.Slice))
        for each in (left, right)
    )
