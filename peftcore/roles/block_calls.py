"""How blocks are called: which dimension of what a module is given has the rows of the batch, and how often one forward
runs a block.

Most models have rows first and run each block once. XLNet turns what it is given, so its blocks have tokens first;
ALBERT runs one block for all of its layers. Nothing in the structure of a model says so, its code does. So the source
of the forwards is read from the host down to the module: values are followed from the arguments on, through what turns
them, to the call of the next module on the way, and so are the loops around that call. Nothing runs. Rule R17 of
`docs/roles.md`.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from types import FunctionType, MethodType
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from peftcore.roles.sources import UNKNOWN, called, definition_of
from peftcore.roles.stacks import arguments

Dims = frozenset[int]
Runs = Literal["once", "several", "unknown"]
Arms = tuple[tuple[ast.stmt, bool], ...]
"""Conditions in the code, and on which side of each a call stands."""
NONE: Dims = frozenset()
FIRST: Dims = frozenset({0})
DEPTH = 8
"""The number of calls within each other that are followed."""
LISTS = nn.ModuleList | nn.ModuleDict
HELD = nn.ModuleList | nn.ModuleDict | nn.Sequential
_ABOUT = {"dtype", "device", "shape", "ndim", "size", "dim", "numel", "stride"}
_TURNS = {"transpose", "swapaxes", "swapdims"}
_REGROUPS = {"view", "reshape", "flatten", "unflatten", "expand"}


class BlockCalls(NamedTuple):
    """The calls of one module in the code: where the rows of the batch are, and how often one forward runs it."""

    rows: Dims
    """The dimensions at which its first argument may have the rows of the batch, where the host is given rows first;
    none where the code cannot be followed."""
    runs: Runs
    """How often one forward runs it."""


class CodeReader:
    """Reads the code of a host; what was read of a module holds for all whose paths differ from its in numbers.

    Args:
        modules: the modules of the host by path.
        plain: returns the class of a module as the host built it.
    """

    def __init__(self, modules: Mapping[str, nn.Module], plain: Callable[[nn.Module], type[nn.Module]]) -> None:
        self._modules, self._plain = modules, plain
        self._read: dict[tuple[str, str], BlockCalls] = {}
        self._turned: dict[str, bool] = {}

    def of(self, path: str, top: str = "") -> BlockCalls:
        """Returns what the code says of a module; its runs are counted from the module `top` on."""
        key = alike(path), top
        if key not in self._read:
            self._read[key] = _read(self._modules, path, top, self._plain)
        return self._read[key]

    def tokens_first(self, path: str) -> bool:
        """Whether a module is given tokens in front of rows, in dimensions 0 and 1; also where that depends on more
        than the code tells."""
        key = alike(path)
        if key not in self._turned:
            wants = (self._wants_tokens_first(each) for each in self._inside(path))
            self._turned[key] = 1 in self.of(path).rows or any(wants)
        return self._turned[key]

    def _inside(self, path: str) -> Iterator[str]:
        return (each for each in self._modules if each == path or each.startswith(f"{path}."))

    def _wants_tokens_first(self, path: str) -> bool:
        """Whether a module is torch's own attention for tokens first, and nothing turns what it is given: then it is
        the user who gives tokens first."""
        module = self._modules[path]
        attends = isinstance(module, nn.MultiheadAttention) and not module.batch_first
        return attends and 1 not in self.of(path).rows


def alike(path: str) -> str:
    """Returns the path of a module with `*` for its numbers: the same for all that stand where it does."""
    return re.sub(r"\d+", "*", path)


class Value(NamedTuple):
    """The value of an expression in the code, as far as it is known."""

    known: Any = UNKNOWN
    """The object, where that is known."""
    rows: Dims = NONE
    """Where the rows of the batch may be in it."""
    loops: frozenset[int] = frozenset()
    """The loops that choose it."""
    part: bool = False
    """Whether it is some of a list, and other code may take the rest."""


class Call(NamedTuple):
    """A call of a module on the way."""

    at: int
    """The number of the called module on the way."""
    given: list[Value]
    named: dict[str, Value]
    runs: Runs
    arms: Arms
    part: bool


def _read(
    modules: Mapping[str, nn.Module], path: str, top: str, plain: Callable[[nn.Module], type[nn.Module]]
) -> BlockCalls:
    steps = path.split(".") if path else []
    paths = ["", *(".".join(steps[: n + 1]) for n in range(len(steps)))]
    way = [modules[each] for each in paths]
    given: dict[str, Dims] | None = None  # rows first, as the host is given them
    rows, runs, at = FIRST, set[Runs](), 0
    while at < len(way) - 1:
        if isinstance(way[at], LISTS):
            at += 1
            continue
        if plain(way[at]).forward is nn.Sequential.forward:
            runs |= {"several" if sum(each is way[at + 1] for each in way[at]._modules.values()) > 1 else "once"}
            at += 1
            given = dict.fromkeys(arguments(plain(way[at]))[:1], rows)
            continue
        calls = _Reader(way, at, plain).calls(given)
        calls = [call for call in calls if call.at == calls[0].at]
        if f"{paths[at]}.".startswith(f"{top}.") or not top:
            runs |= {call.runs for call in calls} or {"unknown"}
            runs |= {"several" for pair in combinations(calls, 2) if _one_behind_the_other(*pair)}
        if not calls:
            given, rows, at = None, FIRST, at + 1
            continue
        at = calls[0].at
        names = arguments(plain(way[at]))
        given = _bound(names, calls)
        rows = given.get(names[0], NONE) if names else NONE
    return BlockCalls(rows, "several" if "several" in runs else "unknown" if "unknown" in runs else "once")


def _one_behind_the_other(first: Call, second: Call) -> bool:
    """Whether one forward comes to both calls of the same module."""
    apart = any(where is there and side is not other for where, side in first.arms for there, other in second.arms)
    return not (apart or first.part or second.part)


def _bound(names: Sequence[str], calls: Sequence[Call]) -> dict[str, Dims]:
    """Returns where the rows are in each argument of a module."""
    given: dict[str, Dims] = {}
    for call in calls:
        for name, value in [*zip(names, call.given, strict=False), *call.named.items()]:
            given[name] = given.get(name, NONE) | value.rows
    return given


class _Reader:
    """Reads the forward of one module on the way, for calls of those further down."""

    def __init__(self, way: Sequence[nn.Module], at: int, plain: Callable[[nn.Module], type[nn.Module]]) -> None:
        self.way, self.at, self.plain = way, at, plain
        self.place = {id(module): number for number, module in enumerate(way)}
        self.found: list[Call] = []
        self.counts: dict[int, int | None] = {}
        """How often each loop runs."""
        self.open: list[int] = []
        self.arms: list[tuple[ast.stmt, bool]] = []
        self.depth = 0

    def calls(self, given: Mapping[str, Dims] | None) -> list[Call]:
        """Returns the calls, for arguments that have the rows there; None: all have them first."""
        function = getattr(self.plain(self.way[self.at]), "forward", None)
        tree = definition_of(function)
        if tree is not None:
            owner, *names = _parameters(tree)
            known = {name: Value(rows=FIRST if given is None else given.get(name, NONE)) for name in names}
            _Frame(self, function, tree, {**known, owner: Value(self.way[self.at])}).run()
        return self.found

    def element(self, held: Any) -> Any:
        """Returns the element of a list on the way that is on the way too."""
        number = self.place.get(id(held), len(self.way)) + 1
        return self.way[number] if number < len(self.way) else UNKNOWN

    def further(self, module: Any) -> int | None:
        """Returns the number of a module that is called on the way."""
        number = self.place.get(id(module))
        return number if number is not None and number > self.at and not isinstance(module, LISTS) else None

    def note(self, at: int, callee: Value, given: list[Value], named: dict[str, Value]) -> None:
        """Record a call of a module on the way."""
        held = self.way[at - 1]
        choosing = [loop for loop in self.open if loop in callee.loops]
        runs: set[Runs] = set()
        for loop in self.open:
            count = self.counts[loop]
            if loop in callee.loops:
                few = isinstance(held, HELD) and count is not None and count > len({*map(id, held.children())})
                runs |= {"several"} if few and len(choosing) == 1 else set()
            elif count != 1:
                runs |= {"unknown" if count is None else "several"} if count != 0 else set()
        often: Runs = "several" if "several" in runs else "unknown" if runs else "once"
        self.found.append(Call(at, given, named, often, tuple(self.arms), callee.part))


class _Frame:
    """The names of one function while its code is followed."""

    def __init__(self, reader: _Reader, function: Any, tree: ast.FunctionDef, names: dict[str, Value]) -> None:
        self.reader, self.tree, self.names = reader, tree, names
        self.globals = {**vars(builtins), **inspect.unwrap(function).__globals__}
        self.returned = Value()

    def run(self) -> Value:
        self._all(self.tree.body)
        return self.returned

    def _all(self, statements: Sequence[ast.stmt]) -> None:
        arms = len(self.reader.arms)
        for statement in statements:
            self._one(statement)
            if isinstance(statement, ast.If) and _ends(statement.body) and not statement.orelse:
                self.reader.arms.append((statement, False))
        del self.reader.arms[arms:]

    def _one(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    self._bind(target, value)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self._bind(target, value)
            case ast.AugAssign(target=target, value=value):
                self._set(target, self._both(target, value))
            case ast.Return(value=ast.expr() as value):
                self.returned = _either(self.returned, self.of(value))
            case ast.Expr(value=value):
                self.of(value)
            case ast.If(test=test, body=body, orelse=otherwise):
                self._choose(statement, test, body, otherwise)
            case ast.For(target=target, iter=each, body=body):
                self._loop(target, each, lambda: self._all(body))
            case ast.While(body=body):
                self._loop(None, None, lambda: self._all(body))
            case ast.With(body=body) | ast.Try(body=body):
                self._all(body)

    def _loop(self, target: ast.expr | None, each: ast.expr | None, body: Callable[[], None]) -> None:
        reader = self.reader
        loop = len(reader.counts)
        reader.counts[loop] = None
        if target is not None and each is not None:
            reader.counts[loop] = self._take(target, each, frozenset({loop}))
        reader.open.append(loop)
        body()
        reader.open.pop()

    def _take(self, target: ast.expr, each: ast.expr, loop: frozenset[int]) -> int | None:
        """Let a loop's target stand for the elements of what it runs over; returns how many there are (at most)."""
        targets = target.elts if isinstance(target, ast.Tuple) else []
        match each:
            case ast.Call(func=ast.Name(id="zip"), args=args) if len(targets) == len(args):
                counts = [self._take(one, of, loop) for one, of in zip(targets, args, strict=True)]
                return min((count for count in counts if count is not None), default=None)
            case ast.Call(func=ast.Name(id="enumerate"), args=[inner, *_]) if len(targets) == 2:
                self._set(targets[0], Value(loops=loop))
                return self._take(targets[1], inner, loop)
            case ast.Call(func=ast.Attribute(value=inner, attr="items" | "named_children")) if len(targets) == 2:
                self._set(targets[0], Value(loops=loop))
                return self._take(targets[1], inner, loop)
            case ast.Call(func=ast.Attribute(value=inner, attr="values" | "children"), args=[]):
                return self._take(target, inner, loop)
        value = self.of(each)
        known, loops = value.known, value.loops | loop
        if isinstance(known, HELD):
            self._set(target, Value(self.reader.element(known), loops=loops, part=value.part))
        else:
            self._set(target, Value(rows=value.rows, loops=loops))
        return len(known) if isinstance(known, HELD | range | list | tuple) else None

    def _choose(
        self, statement: ast.stmt, test: ast.expr, body: Sequence[ast.stmt], otherwise: Sequence[ast.stmt]
    ) -> None:
        """Follow the side of a condition that attributes of modules decide; else both."""
        truth = self._truth(test)
        if truth is not None:
            return self._all(body if truth else otherwise)
        after = []
        before = self.names
        for side, statements in ((True, body), (False, otherwise)):
            self.names = {**before, **_told(test, side)}
            self.reader.arms.append((statement, side))
            self._all(statements)
            self.reader.arms.pop()
            after += [] if _ends(statements) else [self.names]
        self.names = after[0] if after else before
        if len(after) == 2:
            first, second = after
            self.names = {
                name: _either(first.get(name, Value()), second.get(name, Value())) for name in {**first, **second}
            }

    def _truth(self, test: ast.expr) -> bool | None:
        match test:
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                truth = self._truth(operand)
                return None if truth is None else not truth
            case ast.Compare(left=left, ops=[ast.Is() | ast.IsNot() as operation], comparators=[ast.Constant(None)]):
                value = self.of(left).known
                return None if value is UNKNOWN else (value is None) is isinstance(operation, ast.Is)
            case ast.Compare(left=left, ops=[ast.Eq() | ast.NotEq() as operation], comparators=[right]):
                values = [self.of(left).known, self.of(right).known]
                if all(isinstance(each, str | int) for each in values):
                    return (values[0] == values[1]) is isinstance(operation, ast.Eq)
            case ast.Attribute(attr=name) if name != "training":
                value = self.of(test).known
                return bool(value) if isinstance(value, bool | int | float | str | None) else None
        return None

    def _bind(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for each, its in zip(target.elts, value.elts, strict=True):
                self._bind(each, its)
        else:
            self._set(target, self.of(value))

    def _set(self, target: ast.expr, value: Value) -> None:
        if isinstance(target, ast.Name):
            self.names[target.id] = value
        elif isinstance(target, ast.Tuple | ast.List):
            for each in target.elts:
                self._set(each, value._replace(known=UNKNOWN))

    def _both(self, *parts: ast.expr, known: Any = UNKNOWN) -> Value:
        """Returns what is made of several values: it has the rows where the first has them that has any."""
        values = [self.of(part) for part in parts]
        rows = next((value.rows for value in values if value.rows), NONE)
        return Value(known, rows, frozenset[int]().union(*(value.loops for value in values)))

    def of(self, value: ast.expr) -> Value:
        """Returns what an expression stands for."""
        match value:
            case ast.Constant(value=constant):
                return Value(constant)
            case ast.Name(id=name):
                return self.names[name] if name in self.names else Value(self.globals.get(name, UNKNOWN))
            case ast.Attribute(value=inner, attr=name):
                return self._attribute(self.of(inner), name)
            case ast.Subscript(value=inner, slice=place):
                return self._item(self.of(inner), place)
            case ast.Call():
                return self._call(value)
            case ast.IfExp(test=test, body=body, orelse=otherwise):
                truth = self._truth(test)
                if truth is not None:
                    return self.of(body if truth else otherwise)
                return _either(self.of(body), self.of(otherwise))
            case ast.NamedExpr(target=target, value=inner):
                self._bind(target, inner)
                return self.of(target)
            case ast.Starred(value=inner) | ast.UnaryOp(operand=inner):
                return self.of(inner)._replace(known=UNKNOWN)
            case ast.BinOp(left=left, right=right):
                return self._both(left, right)
            case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.BoolOp(values=parts):
                return self._both(*parts)
            case ast.Compare(left=left, comparators=others):
                return self._both(left, *others)._replace(rows=NONE)
            case ast.ListComp(elt=element, generators=[each]) | ast.GeneratorExp(elt=element, generators=[each]):
                return self._comprehend(element, each)
        return Value()

    def _comprehend(self, element: ast.expr, each: ast.comprehension) -> Value:
        made: list[Value] = []
        before = dict(self.names)
        self._loop(each.target, each.iter, lambda: made.append(self.of(element)))
        self.names = before
        return made[0]._replace(known=UNKNOWN)

    def _attribute(self, owner: Value, name: str) -> Value:
        if name in _ABOUT:
            return Value(loops=owner.loops)
        rows = frozenset(1 - dim if dim < 2 else dim for dim in owner.rows) if name == "T" else owner.rows
        return Value(self._member(owner.known, name), rows, owner.loops)

    def _member(self, owner: Any, name: str) -> Any:
        if isinstance(owner, nn.Module):
            if name in owner._modules:
                return owner._modules[name]
            if name in ("__call__", "forward"):
                return owner
            member = inspect.getattr_static(self.reader.plain(owner), name, None)
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
            return Value(known[index.known] if inside else self.reader.element(known), loops=loops, part=True)
        if isinstance(known, list | tuple) and {*map(type, known)} <= {int, str} and len({*known}) == 1:
            return Value(known[0], owner.rows, loops)  # whichever it is
        new = place.elts[0] if isinstance(place, ast.Tuple) and place.elts else place
        deeper = isinstance(new, ast.Constant) and new.value is None
        return Value(rows=frozenset(dim + deeper for dim in owner.rows), loops=loops)

    def _call(self, call: ast.Call) -> Value:
        reader, callee = self.reader, self.of(call.func)
        given = [self.of(each) for each in call.args]
        named = {each.arg: self.of(each.value) for each in call.keywords if each.arg is not None}
        values = [*given, *named.values(), *(self.of(each.value) for each in call.keywords if each.arg is None)]
        made = Value(rows=next((value.rows for value in values if value.rows), NONE),
                     loops=callee.loops.union(*(value.loops for value in values)))  # fmt: skip
        known = callee.known
        if (at := reader.further(known)) is not None:
            reader.note(at, callee, given, named)
            return made
        for number, value in enumerate(given):  # `checkpoint(self.layer.__call__, x)`
            at = reader.further(value.known)
            if at is not None and not _looks(known):
                reader.note(at, value, given[number + 1 :], named)
                return made
        if isinstance(known, MethodType):
            return self._enter(known.__func__, [Value(known.__self__), *given], named, made)
        if isinstance(call.func, ast.Attribute) and not isinstance(known, nn.Module):
            return self._method(call.func, given, made)
        return self._built_in(known, given, made)

    def _built_in(self, known: Any, given: list[Value], made: Value) -> Value:
        first = given[0].known if given else UNKNOWN
        if known is len and isinstance(first, HELD | list | tuple | range):
            return Value(len(first), loops=made.loops)
        if known is range and all(isinstance(each.known, int) for each in given):
            return Value(range(*(each.known for each in given)), loops=made.loops)
        if given and any(known is each for each in (list, tuple, reversed, iter)):
            return given[0]._replace(loops=made.loops)
        return made._replace(rows=NONE) if _looks(known) else made

    def _method(self, function: ast.Attribute, given: list[Value], made: Value) -> Value:
        """Returns what a method of a tensor gives, or the function of torch of that name."""
        owner, rest = self.of(function.value), given
        if inspect.ismodule(owner.known) and given:
            owner, rest = given[0], given[1:]
        if not owner.rows:
            return made
        numbers = [each.known for each in rest]
        return made._replace(rows=_moved(owner.rows, function.attr, numbers))

    def _enter(self, function: Any, given: list[Value], named: dict[str, Value], made: Value) -> Value:
        """Follow the code of a method of a module."""
        tree = definition_of(function)
        if tree is None or self.reader.depth >= DEPTH:
            return made
        names = dict.fromkeys(_parameters(tree), Value())
        plain = [each.arg for each in (*tree.args.posonlyargs, *tree.args.args)]
        names |= {**dict(zip(plain, given, strict=False)), **named}
        if tree.args.vararg is not None:
            names[tree.args.vararg.arg] = made
        self.reader.depth += 1
        returned = _Frame(self.reader, function, tree, names).run()
        self.reader.depth -= 1
        return returned


_LOOKING = (len, isinstance, getattr, hasattr, type, enumerate, zip, list, tuple, iter, reversed, range, int, float)
"""Builtins that are given modules and values and run none of them."""


def _looks(known: Any) -> bool:
    return any(known is each for each in _LOOKING)


def _moved(rows: Dims, name: str, numbers: Sequence[Any]) -> Dims:
    """Returns where the rows are behind a method of a tensor that is given numbers."""
    known = all(isinstance(each, int) for each in numbers)
    if name == "t" or (name in _TURNS and known and len(numbers) == 2):
        first, second = numbers if numbers else (0, 1)
        return frozenset(second if dim == first else first if dim == second else dim for dim in rows)
    if name == "permute" and numbers and known:
        return frozenset(numbers.index(dim) for dim in rows if dim in numbers)
    if name == "unsqueeze" and [*numbers] == [0]:
        return frozenset(dim + 1 for dim in rows)
    return rows & FIRST if name in _REGROUPS else rows


def _either(first: Value, second: Value) -> Value:
    """Returns what a name stands for of which one of two values is there."""
    same = first.known is second.known or (isinstance(first.known, str | int) and first.known == second.known)
    modules = [each.known for each in (first, second) if isinstance(each.known, nn.Module)]
    known = first.known if same else modules[0] if len(modules) == 1 else UNKNOWN
    return Value(known, first.rows | second.rows, first.loops | second.loops, first.part or second.part)


def _told(test: ast.expr, side: bool) -> dict[str, Value]:
    """Returns what a side of a condition tells of a name: that it is None there."""
    match test:
        case ast.Compare(left=ast.Name(id=name), ops=[ast.Is()], comparators=[ast.Constant(None)]) if side:
            return {name: Value(None)}
        case ast.Compare(left=ast.Name(id=name), ops=[ast.IsNot()], comparators=[ast.Constant(None)]) if not side:
            return {name: Value(None)}
    return {}


def _ends(statements: Sequence[ast.stmt]) -> bool:
    """Whether nothing that stands behind these statements runs after them."""
    return bool(statements) and isinstance(statements[-1], ast.Return | ast.Raise | ast.Continue | ast.Break)


def _parameters(tree: ast.FunctionDef) -> list[str]:
    given = tree.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return [each.arg for each in every if each is not None]
