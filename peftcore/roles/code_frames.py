"""Follows values through the source code of a function, without running it.

A `CodeFrame` has the values of the names in one function. It follows the statements in order: assignments, both
branches of a condition (if attributes of modules do not decide it), each loop once, and methods and functions that are
called. For each question about the code there is a subclass, which defines the results of calls, operations and loops.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType, MethodType
from typing import Any, NamedTuple, Self

from torch import Tensor, nn

from peftcore.roles.source_code import UNKNOWN, called, definition_of

Dims = frozenset[int]
NONE: Dims = frozenset()
DEPTH = 8
"""The limit on the depth of nested calls that are followed."""
HELD = nn.ModuleList | nn.ModuleDict | nn.Sequential
_ABOUT = {"dtype", "device", "shape", "ndim", "size", "dim", "numel", "stride"}
"""Attributes and methods of a tensor that return none of its values."""

_COMPARE: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


class Value(NamedTuple):
    """The value of an expression in the code, as far as it is known."""

    known: Any = UNKNOWN
    """The object, if it is known."""
    rows: Dims = NONE
    """The dimensions that may be the value's batch dimension."""
    loops: frozenset[int] = frozenset()
    """The loops whose variables determine the value."""
    part: bool = False
    """Whether the value is a part of a list whose other elements may be used by other code."""
    state: Any = None
    """The state that a question about the code records for the value."""


class CodeFrame:
    """The values of the names in one function while its code is followed.

    Args:
        question: an object that all frames of one question share.
        function: the function.
        tree: the function's code.
        names: the values of the function's parameters.
        plain: returns the class of a module as the host built it.
        depth: the number of frames around this frame.
    """

    def __init__(
        self,
        question: Any,
        function: Any,
        tree: ast.FunctionDef,
        names: dict[str, Value],
        plain: Callable[[nn.Module], type],
        depth: int = 0,
    ) -> None:
        self.question, self.tree, self.names, self.plain, self.depth = question, tree, names, plain, depth
        self.globals = {**vars(builtins), **inspect.unwrap(function).__globals__}
        self.returned = Value()

    # ---- what a question says

    def called(
        self, call: ast.Call, callee: Value, owner: Value | None, given: list[Value], named: dict[str, Value]
    ) -> Value:
        """Returns the value of a call.

        Args:
            call: the call.
            callee: the called object.
            owner: the value whose attribute is called, ``x`` of ``x.view(...)``; None if a name is called.
            given: the arguments by position.
            named: the arguments by name.
        """
        raise NotImplementedError

    def operated(self, operation: ast.operator, left: Value, right: Value, sides: tuple[ast.expr, ast.expr]) -> Value:
        """Returns the value of a binary operation, such as a sum."""
        return self.both(left, right)

    def looped(self, target: ast.expr | None, each: ast.expr | None, body: Callable[[], None]) -> None:
        """Analyse a loop and the statements inside it.

        Args:
            target: the loop variable; None for a ``while`` loop.
            each: the iterable of a ``for`` loop; None for a ``while`` loop.
            body: a function that follows the statements inside the loop once.
        """
        raise NotImplementedError

    def element(self, held: Any) -> Any:
        """Returns the module that represents all elements of a list of modules, for code that selects an element by an
        unknown index."""
        return UNKNOWN

    def branched(self, statement: ast.stmt, side: bool | None) -> None:
        """Called at the start of each branch of an undecided condition, and with None at the end of the condition."""

    # ---- statements

    def run(self) -> Value:
        """Returns the value that the function returns."""
        self.all(self.tree.body)
        return self.returned

    def all(self, statements: Sequence[ast.stmt]) -> None:
        """Follow statements in order. If the body of an ``if`` leaves the function, the statements after it count as
        the other branch of the condition."""
        left = 0
        for statement in statements:
            self._one(statement)
            if isinstance(statement, ast.If) and _ends(statement.body) and not statement.orelse:
                self.branched(statement, False)
                left += 1
        for _ in range(left):
            self.branched(statements[0], None)

    def _one(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    self._bind(target, value)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self._bind(target, value)
            case ast.AugAssign(target=target, op=operation, value=value):
                self.set(target, self._operation(operation, target, value))
            case ast.Return(value=ast.expr() as value):
                self.returned = either(self.of(value), self.returned)
            case ast.Expr(value=value):
                self.of(value)
            case ast.If(test=test, body=body, orelse=otherwise):
                self._choose(statement, test, body, otherwise)
            case ast.For(target=target, iter=each, body=body):
                self.looped(target, each, lambda: self.all(body))
            case ast.While(body=body):
                self.looped(None, None, lambda: self.all(body))
            case ast.With(body=body) | ast.Try(body=body):
                self.all(body)

    def _choose(
        self, statement: ast.stmt, test: ast.expr, body: Sequence[ast.stmt], otherwise: Sequence[ast.stmt]
    ) -> None:
        """Follow only one branch of a condition if attributes of modules decide it, otherwise both branches."""
        truth = self._truth(test)
        if truth is not None:
            return self.all(body if truth else otherwise)
        after = []
        before = self.names
        for side, statements in ((True, body), (False, otherwise)):
            self.names = {**before, **_told(test, side)}
            self.branched(statement, side)
            self.all(statements)
            self.branched(statement, None)
            after += [] if _ends(statements) else [self.names]
        self.names = after[0] if after else before
        if len(after) == 2:
            first, second = after
            self.names = {
                name: either(first.get(name, Value()), second.get(name, Value())) for name in {**first, **second}
            }

    def _truth(self, test: ast.expr) -> bool | None:
        match test:
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                truth = self._truth(operand)
                return None if truth is None else not truth
            case ast.Compare(left=left, ops=[ast.Is() | ast.IsNot() as operation], comparators=[ast.Constant(None)]):
                value = self.of(left).known
                return None if value is UNKNOWN else (value is None) is isinstance(operation, ast.Is)
            case ast.Compare(left=left, ops=[operation], comparators=[right]) if type(operation) in _COMPARE:
                values = [self.of(left).known, self.of(right).known]
                if any(all(isinstance(each, kind) for each in values) for kind in (str, int | float)):
                    return bool(_COMPARE[type(operation)](*values))
            case ast.Attribute(attr=name) if name != "training":
                value = self.of(test).known
                return bool(value) if isinstance(value, bool | int | float | str | None) else None
        return None

    def _bind(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for each, its in zip(target.elts, value.elts, strict=True):
                self._bind(each, its)
        else:
            self.set(target, self.assigned(target, value))

    def assigned(self, target: ast.expr, value: ast.expr) -> Value:
        """Returns the value of an expression that is assigned to a target."""
        return self.of(value)

    def set(self, target: ast.expr, value: Value) -> None:
        """Assign a value to a target. If the target is a tuple of names, only the first name gets the value's
        `state`."""
        if isinstance(target, ast.Name):
            self.names[target.id] = value
        elif isinstance(target, ast.Tuple | ast.List):
            for place, each in enumerate(target.elts):
                self.set(each, value._replace(known=UNKNOWN, state=None if place else value.state))

    # ---- expressions

    def of(self, value: ast.expr) -> Value:
        """Returns the value of an expression."""
        match value:
            case ast.Constant(value=constant):
                return Value(constant)
            case ast.Name(id=name):
                return self.names[name] if name in self.names else Value(self.globals.get(name, UNKNOWN))
            case ast.Attribute(value=inner, attr=name):
                return self._attribute(self.of(inner), name)
            case ast.Subscript(value=inner, slice=place):
                return self._item(self.of(inner), place)
            case ast.Call(func=ast.Attribute(value=inner, attr=name)):
                owner = self.of(inner)
                return self.called(value, self._attribute(owner, name), owner, *self._arguments(value))
            case ast.Call(func=function):
                return self.called(value, self.of(function), None, *self._arguments(value))
            case ast.IfExp(test=test, body=body, orelse=otherwise):
                truth = self._truth(test)
                if truth is not None:
                    return self.of(body if truth else otherwise)
                return either(self.of(body), self.of(otherwise))
            case ast.NamedExpr(target=target, value=inner):
                self._bind(target, inner)
                return self.of(target)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() as number)):
                return Value(-number)
            case ast.Starred(value=inner) | ast.UnaryOp(operand=inner):
                return self.of(inner)._replace(known=UNKNOWN)
            case ast.BinOp(left=left, op=operation, right=right):
                return self._operation(operation, left, right)
            case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.BoolOp(values=parts):
                values = [self.of(part) for part in parts]
                return self.both(*values)._replace(state=values[0].state if values else None)
            case ast.Compare(left=left, comparators=others):
                return self.both(*(self.of(each) for each in (left, *others)))._replace(rows=NONE)
            case ast.ListComp(elt=element, generators=[each]) | ast.GeneratorExp(elt=element, generators=[each]):
                return self._comprehend(element, each)
        return Value()

    def both(self, *values: Value) -> Value:
        """Returns the result of an operation on several values. Its batch dimensions are those of the first value that
        has any."""
        rows = next((value.rows for value in values if value.rows), NONE)
        return Value(rows=rows, loops=frozenset[int]().union(*(value.loops for value in values)))

    def _operation(self, operation: ast.operator, left: ast.expr, right: ast.expr) -> Value:
        return self.operated(operation, self.of(left), self.of(right), (left, right))

    def _arguments(self, call: ast.Call) -> tuple[list[Value], dict[str, Value]]:
        """Returns the arguments by position, and by name; the values of ``**kwargs`` have the name "**"."""
        return [self.of(each) for each in call.args], {each.arg or "**": self.of(each.value) for each in call.keywords}

    def _comprehend(self, element: ast.expr, each: ast.comprehension) -> Value:
        made: list[Value] = []
        before = dict(self.names)
        self.looped(each.target, each.iter, lambda: made.append(self.of(element)))
        self.names = before
        return made[0]._replace(known=UNKNOWN) if made else Value()

    def _attribute(self, owner: Value, name: str) -> Value:
        if name in _ABOUT:
            return Value(loops=owner.loops)
        rows = frozenset(1 - dim if dim < 2 else dim for dim in owner.rows) if name == "T" else owner.rows
        return Value(self._member(owner.known, name), rows, owner.loops, state=owner.state)

    def _member(self, owner: Any, name: str) -> Any:
        if isinstance(owner, nn.Module):
            if name in owner._modules:
                return owner._modules[name]
            if name in ("__call__", "forward"):
                return owner
            member = inspect.getattr_static(self.plain(owner), name, None)
            if name not in vars(owner) and isinstance(member, FunctionType):
                return MethodType(member, owner)
        if owner is UNKNOWN or isinstance(owner, type):
            return UNKNOWN
        try:
            found = vars(owner).get(name, UNKNOWN)
        except TypeError:  # numbers, strings
            return UNKNOWN
        return UNKNOWN if isinstance(found, Tensor) else called(found)

    def _item(self, owner: Value, place: ast.expr) -> Value:
        known = owner.known
        if isinstance(place, ast.Slice):
            return owner._replace(part=True)
        index = self.of(place)
        loops = owner.loops | index.loops
        if isinstance(known, HELD):
            here = isinstance(index.known, int) and not isinstance(known, nn.ModuleDict)
            inside = here and -len(known) <= index.known < len(known)
            return Value(known[index.known] if inside else self.element(known), loops=loops, part=True)
        if isinstance(known, list | tuple) and {*map(type, known)} <= {int, str} and len({*known}) == 1:
            return Value(known[0], owner.rows, loops)  # whichever it is
        new = place.elts[0] if isinstance(place, ast.Tuple) and place.elts else place
        deeper = isinstance(new, ast.Constant) and new.value is None
        return Value(rows=frozenset(dim + deeper for dim in owner.rows), loops=loops, state=owner.state)

    def entered(self, function: Any, given: Sequence[Value], named: Mapping[str, Value], rest: Value) -> Value | None:
        """Returns the value that a function returns, by following its code; None if the code is not available or too
        deep.

        Args:
            function: the function; of a bound method, its ``__func__``.
            given: the arguments by position, including `self`.
            named: the arguments by name.
            rest: the value of ``*args`` of the function.
        """
        tree = definition_of(function)
        if tree is None or self.depth >= DEPTH:
            return None
        names = dict.fromkeys(parameters(tree), Value())
        plain = [each.arg for each in (*tree.args.posonlyargs, *tree.args.args)]
        names |= {**dict(zip(plain, given, strict=False)), **named}
        if tree.args.vararg is not None:
            names[tree.args.vararg.arg] = rest
        return self._inner(function, tree, names).run()

    def _inner(self, function: Any, tree: ast.FunctionDef, names: dict[str, Value]) -> Self:
        return type(self)(self.question, function, tree, names, self.plain, self.depth + 1)


def either(first: Value, second: Value) -> Value:
    """Returns the value of a name that has one of two values."""
    same = first.known is second.known or (isinstance(first.known, str | int) and first.known == second.known)
    modules = [each.known for each in (first, second) if isinstance(each.known, nn.Module)]
    known = first.known if same else modules[0] if len(modules) == 1 else UNKNOWN
    state = second.state if first.state is None else first.state
    return Value(known, first.rows | second.rows, first.loops | second.loops, first.part or second.part, state)


def parameters(tree: ast.FunctionDef) -> list[str]:
    """Returns the names of all parameters of a function."""
    given = tree.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return [each.arg for each in every if each is not None]


def _told(test: ast.expr, side: bool) -> dict[str, Value]:
    """Returns the variable that is None on this side of a condition, mapped to the value None. The result is empty if
    the condition does not compare a variable with None."""
    match test:
        case ast.Compare(left=ast.Name(id=name), ops=[ast.Is()], comparators=[ast.Constant(None)]) if side:
            return {name: Value(None)}
        case ast.Compare(left=ast.Name(id=name), ops=[ast.IsNot()], comparators=[ast.Constant(None)]) if not side:
            return {name: Value(None)}
    return {}


def _ends(statements: Sequence[ast.stmt]) -> bool:
    """Whether no statement after these statements can run."""
    return bool(statements) and isinstance(statements[-1], ast.Return | ast.Raise | ast.Continue | ast.Break)
