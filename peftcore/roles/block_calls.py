"""How blocks are called: which dimension of a module's inputs is the batch dimension, and how often one forward runs a
block.

Most models have rows first and run each block once. XLNet transposes its inputs, so its blocks have tokens first;
ALBERT runs one block for all of its layers. The structure of a model does not show this, but its code does. So this
module reads the source of the forwards from the host down to the module. It follows values from the arguments, through
transpositions, to the call of the next module on the path, and the loops around that call. No code runs. Rule R17 of
`docs/roles.md`.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from types import MethodType
from typing import Any, Literal, NamedTuple

from torch import nn

from peftcore.roles.code_frames import HELD, NONE, CodeFrame, Dims, Value, parameters
from peftcore.roles.source_code import UNKNOWN, definition_of
from peftcore.roles.stacks import arguments

Runs = Literal["once", "several", "unknown"]
Arms = tuple[tuple[ast.stmt, bool], ...]
"""Conditions in the code that surround a call, each with the branch that contains the call."""
FIRST: Dims = frozenset({0})
LISTS = nn.ModuleList | nn.ModuleDict
_TURNS = {"transpose", "swapaxes", "swapdims"}
_REGROUPS = {"view", "reshape", "flatten", "unflatten", "expand"}


class BlockCalls(NamedTuple):
    """The calls of one module in the code: the dimension of the batch, and the number of runs in one forward."""

    rows: Dims
    """The dimensions that may be the batch dimension of the module's first argument, if the host gets rows first; empty
    if the code cannot be followed."""
    runs: Runs
    """The number of runs of the module in one forward."""


class CodeReader:
    """Reads the code of a host. The results for a module are reused for all modules whose paths differ only in numbers.

    Args:
        modules: the modules of the host by path.
        plain: returns the class of a module as the host built it.
    """

    def __init__(self, modules: Mapping[str, nn.Module], plain: Callable[[nn.Module], type[nn.Module]]) -> None:
        self._modules, self._plain = modules, plain
        self._read: dict[tuple[str, str], BlockCalls] = {}
        self._turned: dict[str, bool] = {}

    def of(self, path: str, top: str = "") -> BlockCalls:
        """Returns how the code calls a module. Its runs are counted in one forward of the module `top`."""
        key = alike(path), top
        if key not in self._read:
            self._read[key] = _read(self._modules, path, top, self._plain)
        return self._read[key]

    def tokens_first(self, path: str) -> bool:
        """Whether a module's inputs have tokens in dimension 0 and rows in dimension 1; True also if this depends on
        values that are not known from the code."""
        key = alike(path)
        if key not in self._turned:
            wants = (self._wants_tokens_first(each) for each in self._inside(path))
            self._turned[key] = 1 in self.of(path).rows or any(wants)
        return self._turned[key]

    def _inside(self, path: str) -> Iterator[str]:
        return (each for each in self._modules if each == path or each.startswith(f"{path}."))

    def _wants_tokens_first(self, path: str) -> bool:
        """Whether a module is torch's own attention for tokens first, and its inputs are not transposed on the way:
        then the user passes tokens first."""
        module = self._modules[path]
        attends = isinstance(module, nn.MultiheadAttention) and not module.batch_first
        return attends and 1 not in self.of(path).rows


def alike(path: str) -> str:
    """Returns the path of a module with `*` instead of numbers. Corresponding modules of all blocks have the same
    result."""
    return re.sub(r"\d+", "*", path)


class FollowedCall(NamedTuple):
    """A call of a module on the path from the host to the module in question."""

    at: int
    """The index of the called module on this path."""
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


def _one_behind_the_other(first: FollowedCall, second: FollowedCall) -> bool:
    """Whether one forward can run both of these calls of one module."""
    apart = any(where is there and side is not other for where, side in first.arms for there, other in second.arms)
    return not (apart or first.part or second.part)


def _bound(names: Sequence[str], calls: Sequence[FollowedCall]) -> dict[str, Dims]:
    """Returns the batch dimensions of each argument of a module, by the argument's name."""
    given: dict[str, Dims] = {}
    for call in calls:
        for name, value in [*zip(names, call.given, strict=False), *call.named.items()]:
            given[name] = given.get(name, NONE) | value.rows
    return given


class _Reader:
    """Reads the forward of one module on the path `way`, to find calls of modules further down on this path."""

    def __init__(self, way: Sequence[nn.Module], at: int, plain: Callable[[nn.Module], type[nn.Module]]) -> None:
        self.way, self.at, self.plain = way, at, plain
        self.place = {id(module): number for number, module in enumerate(way)}
        self.found: list[FollowedCall] = []
        self.counts: dict[int, int | None] = {}
        """How often each loop runs."""
        self.open: list[int] = []
        self.arms: list[tuple[ast.stmt, bool]] = []

    def calls(self, given: Mapping[str, Dims] | None) -> list[FollowedCall]:
        """Returns the calls. `given` maps the names of arguments to their batch dimensions; None means that rows are
        first in all arguments."""
        function = getattr(self.plain(self.way[self.at]), "forward", None)
        tree = definition_of(function)
        if tree is not None:
            owner, *names = parameters(tree)
            known = {name: Value(rows=FIRST if given is None else given.get(name, NONE)) for name in names}
            _Frame(self, function, tree, {**known, owner: Value(self.way[self.at])}, self.plain).run()
        return self.found

    def further(self, module: Any) -> int | None:
        """Returns the index of a module on the path; None if the module is not further down on the path."""
        number = self.place.get(id(module))
        return number if number is not None and number > self.at and not isinstance(module, LISTS) else None

    def note(self, at: int, callee: Value, given: list[Value], named: dict[str, Value]) -> None:
        """Record a call of a module on the path."""
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
        self.found.append(FollowedCall(at, given, named, often, tuple(self.arms), callee.part))


class _Frame(CodeFrame):
    """Follows the code of one function. Records calls of modules on the path, and the batch dimensions of values."""

    question: _Reader

    def element(self, held: Any) -> Any:
        """Returns the element of a list of modules that is on the path, if the list is on the path."""
        way = self.question.way
        number = self.question.place.get(id(held), len(way)) + 1
        return way[number] if number < len(way) else UNKNOWN

    def branched(self, statement: ast.stmt, side: bool | None) -> None:
        if side is None:
            self.question.arms.pop()
        else:
            self.question.arms.append((statement, side))

    def looped(self, target: ast.expr | None, each: ast.expr | None, body: Callable[[], None]) -> None:
        reader = self.question
        loop = len(reader.counts)
        reader.counts[loop] = None
        if target is not None and each is not None:
            reader.counts[loop] = self._take(target, each, frozenset({loop}))
        reader.open.append(loop)
        body()
        reader.open.pop()

    def _take(self, target: ast.expr, each: ast.expr, loop: frozenset[int]) -> int | None:
        """Assign the elements of a loop's iterable to the loop's target; returns their number (at most)."""
        targets = target.elts if isinstance(target, ast.Tuple) else []
        match each:
            case ast.Call(func=ast.Name(id="zip"), args=args) if len(targets) == len(args):
                counts = [self._take(one, of, loop) for one, of in zip(targets, args, strict=True)]
                return min((count for count in counts if count is not None), default=None)
            case ast.Call(func=ast.Name(id="enumerate"), args=[inner, *_]) if len(targets) == 2:
                self.set(targets[0], Value(loops=loop))
                return self._take(targets[1], inner, loop)
            case ast.Call(func=ast.Attribute(value=inner, attr="items" | "named_children")) if len(targets) == 2:
                self.set(targets[0], Value(loops=loop))
                return self._take(targets[1], inner, loop)
            case ast.Call(func=ast.Attribute(value=inner, attr="values" | "children"), args=[]):
                return self._take(target, inner, loop)
        value = self.of(each)
        known, loops = value.known, value.loops | loop
        if isinstance(known, HELD):
            self.set(target, Value(self.element(known), loops=loops, part=value.part))
        else:
            self.set(target, Value(rows=value.rows, loops=loops))
        return len(known) if isinstance(known, HELD | range | list | tuple) else None

    def called(
        self, call: ast.Call, callee: Value, owner: Value | None, given: list[Value], named: dict[str, Value]
    ) -> Value:
        reader, known = self.question, callee.known
        made = self.both(*given, *named.values())
        made = made._replace(loops=made.loops | callee.loops)
        by_name = {name: value for name, value in named.items() if name != "**"}
        if (at := reader.further(known)) is not None:
            reader.note(at, callee, given, by_name)
            return made
        for number, value in enumerate(given):  # `checkpoint(self.layer.__call__, x)`
            at = reader.further(value.known)
            if at is not None and not _looks(known):
                reader.note(at, value, given[number + 1 :], by_name)
                return made
        if isinstance(known, MethodType):
            returned = self.entered(known.__func__, [Value(known.__self__), *given], by_name, made)
            return made if returned is None else returned
        if owner is not None and not isinstance(known, nn.Module):
            assert isinstance(call.func, ast.Attribute)
            return self._method(owner, call.func.attr, given, made)
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

    def _method(self, owner: Value, name: str, given: list[Value], made: Value) -> Value:
        """Returns the result of a method of a tensor, or of the function of torch with that name."""
        rest = given
        if inspect.ismodule(owner.known) and given:
            owner, rest = given[0], given[1:]
        if not owner.rows:
            return made
        return made._replace(rows=_moved(owner.rows, name, [each.known for each in rest]))


_LOOKING = (len, isinstance, getattr, hasattr, type, enumerate, zip, list, tuple, iter, reversed, range, int, float)
"""Builtins that take modules and values without running them."""


def _looks(known: Any) -> bool:
    return any(known is each for each in _LOOKING)


def _moved(rows: Dims, name: str, numbers: Sequence[Any]) -> Dims:
    """Returns the batch dimensions after a tensor method, such as `transpose`, with the arguments `numbers`."""
    known = all(isinstance(each, int) for each in numbers)
    if name == "t" or (name in _TURNS and known and len(numbers) == 2):
        first, second = numbers if numbers else (0, 1)
        return frozenset(second if dim == first else first if dim == second else dim for dim in rows)
    if name == "permute" and numbers and known:
        return frozenset(numbers.index(dim) for dim in rows if dim in numbers)
    if name == "unsqueeze" and [*numbers] == [0]:
        return frozenset(dim + 1 for dim in rows)
    return rows & FIRST if name in _REGROUPS else rows
