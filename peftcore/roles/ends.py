"""Where a branch ends: what a block does to a branch's output behind its last matrix, before it adds it to the stream.

Dropout, layer scale, stochastic depth and norms of a branch's output are modules that are called behind the last
matrix, and nothing in the structure of a model says which: T5 drops the hidden features by a module beside the last
matrix, GPT-2 what the matrix returns. The code says it. So the source of the forwards is read from the last matrix up
to the block, and the value that the matrix returns is followed through assignments, calls and methods until it meets
another summand. Nothing runs.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import FunctionType, MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.roles.sources import UNKNOWN, called, definition_of
from peftcore.roles.vocabulary import DROP_PATH_CLASS

Rest = Literal["", "dropout", "scale", "unknown"]
Order = tuple[int, ...]
"""An order of dimensions, as `Tensor.permute` takes it."""


class State(Enum):
    """The relation of a value in the code to the branch."""

    BRANCH = "branch"  # the last matrix returned it, or it was made of that
    SUM = "sum"  # something else was added to it


DEPTH = 8
"""The number of calls within each other that are followed."""
_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout}
_SCALES = {"mul", "mul_", "multiply", "multiply_", "div", "div_"}
_SUMS = {"add", "add_"}
_ABOUT = {"dtype", "device", "shape", "ndim"}
_SHAPES = {"reshape", "view", "flatten", "unflatten"}
_CASTS = {"to", "type", "type_as", "float", "half", "bfloat16", "contiguous", "clone"}


@dataclass(frozen=True)
class End:
    """The end of a branch.

    Attributes:
        path: the module behind which the branch joins the stream; None where no module follows the last matrix.
        order: the order of dimensions that the branch's output has there, where the code permutes it on the way.
        drops_path: whether that module is stochastic depth, which drops the branch of whole rows.
        rest: what the block's code does behind it without a module: "dropout", "scale" (also by a parameter), or
            "unknown" where the code cannot be followed, or changes the shape before another module; else "".
        entered: the module that is given the sum of stream and branch, and nothing else is (a norm behind the branch).
        left: the module that returns the sum, when nothing has read it.
        reader: the first module that is given the sum, alone and in whatever shape (the norm of the next branch).
    """

    path: str | None = None
    order: Order | None = None
    drops_path: bool = False
    rest: Rest = ""
    entered: str | None = None
    left: str | None = None
    reader: str | None = None


def find_end(modules: Mapping[str, nn.Module], last: str, block: str | None, plain: Callable[[nn.Module], type]) -> End:
    """Returns the end of a branch by the path of its last matrix, or of the module that reads it.

    Args:
        modules: the modules of the host by path.
        last: the path of the branch's last matrix.
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
    """The way of one value through the code of forwards."""

    plain: Callable[[nn.Module], type]
    end: nn.Module | None = None
    """The last module through which it went."""
    order: Order | None = None
    order_there: Order | None = None
    reshaped: bool = False
    rest: Rest = ""
    summed: bool = False
    entered: nn.Module | None = None
    reader: nn.Module | None = None
    read: bool = False
    """Whether the sum was given to anything."""
    start: nn.Module | None = None
    depth: int = 0

    def through(self, owner: nn.Module, start: nn.Module) -> State | None:
        """Follow the value through the forward of a module; returns what the module returns of it."""
        self.start = start
        if isinstance(owner, nn.Sequential):
            after = list(owner)
            after = after[next(i for i, each in enumerate(after) if each is start) + 1 :]
            for module in after:
                if self.passes(module) is None:
                    return None
            return State.BRANCH
        return self.enter(getattr(self.plain(owner), "forward", None), [owner], {})

    def enter(self, function: Any, args: list[Any], kwargs: Mapping[str, Any]) -> State | None:
        """Follow the value through a function; arguments are objects, or states of values."""
        definition = definition_of(function)
        if definition is None or self.depth >= DEPTH:
            return None
        self.depth += 1
        try:
            return _Frame(self, inspect.unwrap(function).__globals__, definition, args, kwargs).run()
        finally:
            self.depth -= 1

    def passes(self, module: nn.Module, alone: bool = True) -> State | None:
        """Go through a module that is called with the value, unless it has matrices or is given more than that, such as
        a residual."""
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
        """Whether nothing has read the sum, nor does the branch lie otherwise in it."""
        return not self.read and self.order is None and not self.reshaped

    def add(self) -> State:
        self.summed = True
        return State.SUM

    def permute(self, order: Order) -> None:
        self.order = order if self.order is None else tuple(self.order[dim] for dim in order)


class _Frame:
    """The names of one function while its code is followed."""

    def __init__(
        self,
        trail: _Trail,
        names: Mapping[str, Any],
        definition: ast.FunctionDef,
        args: list[Any],
        kwargs: Mapping[str, Any],
    ) -> None:
        self.trail, self.globals, self.definition = trail, names, definition
        parameters = [each.arg for each in (*definition.args.posonlyargs, *definition.args.args)]
        self.known: dict[str, Any] = {**dict(zip(parameters, args, strict=False)), **kwargs}
        self.returned: State | None = None

    def run(self) -> State | None:
        self._all(self.definition.body)
        return self.returned

    def _all(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            self._one(statement)

    def _one(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    self._bind(target, value)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self._bind(target, value)
            case ast.AugAssign(target=target, op=operation, value=value):
                state = self._operate(operation, target, value)
                self._set(target, UNKNOWN if state is None else state)
            case ast.Return(value=ast.expr() as value):
                self.returned = self.of(value) or self.returned
            case ast.Expr(value=value):
                self.of(value)
            case ast.If(test=test, body=body, orelse=otherwise):
                self._choose(test, body, otherwise)
            case ast.For(target=target, iter=each, body=body) if isinstance(
                modules := self.object(each), nn.ModuleList | nn.Sequential
            ):
                for module in modules:
                    self._set(target, module)
                    self._all(body)
            case ast.For(body=body) | ast.While(body=body) | ast.With(body=body) | ast.Try(body=body):
                self._all(body)

    def _choose(self, test: ast.expr, body: list[ast.stmt], otherwise: list[ast.stmt]) -> None:
        """Follow the side of a condition that the module's attributes decide; else both."""
        truth = self._truth(test)
        if truth is not None:
            return self._all(body if truth else otherwise)
        before = dict(self.known)
        self._all(body)
        first, self.known = self.known, before
        self._all(otherwise)
        for name, value in first.items():
            self.known[name] = value if isinstance(value, State) else self.known.get(name, value)

    def _truth(self, test: ast.expr) -> bool | None:
        match test:
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                truth = self._truth(operand)
                return None if truth is None else not truth
            case ast.Compare(left=left, ops=[ast.Is() | ast.IsNot() as operation], comparators=[ast.Constant(None)]):
                value = self.object(left)
                return None if value is UNKNOWN else (value is None) is isinstance(operation, ast.Is)
            case ast.Attribute(attr="training"):
                return None
            case ast.Attribute():
                value = self.object(test)
                return bool(value) if isinstance(value, bool | int | float | str | None) else None
        return None

    def _bind(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for each, its in zip(target.elts, value.elts, strict=True):
                self._bind(each, its)
            return
        name = target.id if isinstance(target, ast.Name) else None
        state = self.of(value, name)
        if isinstance(target, ast.Tuple):
            for place, each in enumerate(target.elts):
                self._set(each, UNKNOWN if place or state is None else state)
        else:
            self._set(target, state if state is not None else self.object(value))

    def _set(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Name):
            self.known[target.id] = value

    def of(self, value: ast.expr, goes_to: str | None = None) -> State | None:
        """Returns the state of an expression, whose value a name gets."""
        match value:
            case ast.Name(id=name):
                known = self.known.get(name)
                return known if isinstance(known, State) else None
            case ast.Attribute(attr=name) if name in _ABOUT:
                return None
            case ast.Subscript(value=inner) | ast.Attribute(value=inner) | ast.Starred(value=inner):
                return self.of(inner)
            case ast.Tuple(elts=[first, *_]):
                return self.of(first)
            case ast.NamedExpr(target=target, value=inner):
                self._bind(target, inner)
                return self.of(target)
            case ast.IfExp(test=test, body=body, orelse=otherwise):
                truth = self._truth(test)
                if truth is not None:
                    return self.of(body if truth else otherwise)
                return self.of(body) or self.of(otherwise)
            case ast.BinOp(left=left, op=operation, right=right):
                return self._operate(operation, left, right)
            case ast.Call():
                return self._call(value, goes_to)
        return None

    def _operate(self, operation: ast.operator, left: ast.expr, right: ast.expr) -> State | None:
        states = [self.of(left), self.of(right)]
        adds = isinstance(operation, ast.Add | ast.Sub)
        if State.SUM in states or State.BRANCH not in states:
            if State.SUM in states and adds:
                return State.SUM
            self._read(states)
            return None
        if _joins_tuples(left, right):
            return State.BRANCH
        if adds:
            return self.trail.add()
        self.trail.rest = "scale"
        return State.BRANCH

    def _call(self, call: ast.Call, goes_to: str | None) -> State | None:
        function = self.object(call.func)
        if function is self.trail.start:
            return State.BRANCH
        args = [self._argument(each) for each in call.args]
        kwargs = {each.arg: self._argument(each.value) for each in call.keywords if each.arg is not None}
        given = [each for each in (*args, *kwargs.values()) if isinstance(each, State)]
        if any(each is self.trail.start for each in args):
            return State.BRANCH  # `checkpoint(self.attn, x)`
        if isinstance(function, nn.Module):
            if given != [State.BRANCH]:
                self._enter_sum(function, call, goes_to, given)
                return None
            return self.trail.passes(function, alone=len(args) + len(kwargs) == 1)
        if isinstance(call.func, ast.Attribute) and (state := self.of(call.func.value)) is not None:
            return self._method(call.func.attr, state, args)
        if isinstance(function, FunctionType) and function in _DROPOUTS:
            return self._dropped(given, args[1] if len(args) > 1 else kwargs.get("p", 0.5))
        if isinstance(function, MethodType):
            return self.trail.enter(function.__func__, [function.__self__, *args], kwargs)
        if isinstance(function, FunctionType) and not function.__module__.startswith("torch."):
            found = self.trail.enter(function, args, kwargs)
            if found is None and given:
                self.trail.rest = "unknown"
            return found
        if State.BRANCH in given:
            self.trail.reshaped = True
            return State.BRANCH
        if function is torch.clamp:  # which keeps numbers of half precision finite
            return given[0] if given else None
        self._read(given)
        return None

    def _enter_sum(self, module: nn.Module, call: ast.Call, goes_to: str | None, given: list[State]) -> None:
        """Note a module that is given the sum, if no name keeps the sum."""
        kept = any(value is State.SUM and name != goes_to for name, value in self.known.items())
        if given == [State.SUM] and len(call.args) + len(call.keywords) == 1 and not kept and self.trail.is_whole():
            self.trail.entered = module
        if given == [State.SUM] and len(call.args) + len(call.keywords) == 1 and not self.trail.read:
            self.trail.reader = module
        self._read(given)

    def _read(self, given: Sequence[State | None]) -> None:
        self.trail.read = self.trail.read or State.SUM in given

    def _argument(self, value: ast.expr) -> Any:
        state = self.of(value)
        return self.object(value) if state is None else state

    def _method(self, name: str, state: State, args: list[Any]) -> State | None:
        if name in ("size", "dim", "numel"):
            return None
        if state is State.SUM and name in _SHAPES:
            self.trail.reshaped = True  # what is made of it is the stream still, but nobody knows how it lies
            return state
        if state is State.SUM and name not in _SUMS | _CASTS:
            self._read([state])
            return None
        if state is State.BRANCH:
            if name in _SUMS:
                return self.trail.add()
            if name in _SCALES:
                self.trail.rest = "scale"
            elif name == "permute" and args and all(isinstance(each, int) and each >= 0 for each in args):
                self.trail.permute(tuple(args))
            elif name not in _CASTS:
                self.trail.reshaped = True
        return state

    def _dropped(self, given: list[State], probability: Any) -> State | None:
        if given == [State.BRANCH] and (not isinstance(probability, int | float) or probability > 0):
            self.trail.rest = self.trail.rest or "dropout"
        self._read(given)
        return State.BRANCH if given == [State.BRANCH] else None

    def object(self, value: ast.expr) -> Any:
        """Returns the object that an expression names; `UNKNOWN` where it is made while the code runs."""
        match value:
            case ast.Constant(value=constant):
                return constant
            case ast.Name(id=name):
                if name in self.known:
                    known = self.known[name]
                    return UNKNOWN if isinstance(known, State) else known
                return self.globals.get(name, UNKNOWN)
            case ast.Attribute(value=inner, attr=name):
                owner = self.object(inner)
                return UNKNOWN if owner is UNKNOWN else self._attribute(owner, name)
            case ast.Subscript(value=inner, slice=place):
                owner, index = self.object(inner), _index(place)
                if (
                    index is not None
                    and isinstance(owner, nn.ModuleList | nn.Sequential)
                    and -len(owner) <= index < len(owner)
                ):
                    return owner[index]
        return UNKNOWN

    def _attribute(self, owner: Any, name: str) -> Any:
        if isinstance(owner, nn.Module):
            if name in owner._modules:
                return owner._modules[name]
            cls = self.trail.plain(owner)
            if name not in vars(owner) and isinstance(member := inspect.getattr_static(cls, name, None), FunctionType):
                return MethodType(member, owner)
            found = vars(owner).get(name, UNKNOWN)
            return UNKNOWN if isinstance(found, Tensor) else called(found)
        if inspect.ismodule(owner):
            return vars(owner).get(name, UNKNOWN)
        return UNKNOWN


def _joins_tuples(left: ast.expr, right: ast.expr) -> bool:
    """Whether a sum puts tuples one behind the other: `(hidden,) + outputs[1:]`."""
    return any(
        isinstance(each, ast.Tuple) or (isinstance(each, ast.Subscript) and isinstance(each.slice, ast.Slice))
        for each in (left, right)
    )


def _index(place: ast.expr) -> int | None:
    """Returns an index that stands in the code."""
    try:
        index = ast.literal_eval(place)
    except ValueError:
        return None
    return index if isinstance(index, int) else None
