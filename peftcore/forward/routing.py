"""Per-sample adapters: rows of a batch go to different injections, over one base forward where possible."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.errors import RouteError
from peftcore.forward.active_adapters import Route
from peftcore.forward.context import HERE, ForwardContext, forward_context
from peftcore.forward.draws import draws_of, own_draws_aside


class OneForward:
    """A forward that runs once for the same inputs, however often its output is asked for.

    It begins anew in an extra pass (`ForwardContext.without`), where other injections act.

    Args:
        run: the forward.
        module: the module whose forward it is. Where that has modules inside, other inputs raise a RouteError: they
            would fill caches more than once.
    """

    def __init__(self, run: Callable[..., Any], module: nn.Module) -> None:
        self.run, self._module = run, module
        self._context = _running()
        self._asked: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._output: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _running() is not self._context:
            return self.run(*args, **kwargs)
        if self._asked is None:
            self._asked, self._output = (args, kwargs), self.run(*args, **kwargs)
            return self._output
        if _same(self._asked, args, kwargs):
            return self._output
        return self.changed(*args, **kwargs)

    def changed(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the output for other inputs.

        Raises:
            RouteError: the module has others inside.
        """
        if self._module._modules:
            raise RouteError(
                f"an injection changes the inputs of a whole {type(self._module).__name__}, which would have to run "
                "once for each injection of the route (and fill caches more than once); route without it"
            )
        return self.run(*args, **kwargs)


def _running() -> ForwardContext | None:
    return HERE.calls[-1] if HERE.calls else None


class OwnRows:
    """The rows of one injection of a route, while an operator of it runs in a module: what has a row for each row of
    the batch, or for each that the module sees, has its rows alone.

    Args:
        route: the route.
        position: that of the injection in the route; -1 for the rows of the bare base model.
        count: how many rows the module sees: a multiple of the route's.
    """

    def __init__(self, route: Route, position: int, count: int) -> None:
        self.route, self.position, self.count = route, position, count
        self._batch = {len(route.index), len(route.index) * route.copies}
        self._counts = {count, *self._batch}

    def index(self, count: int, device: torch.device) -> Tensor:
        """Returns which of `count` rows are its own, in order."""
        return self.route.groups(count, device)[0][self.position]

    def of(self, value: Any) -> Any:
        """Returns its rows of a tensor, or of the tensors in nested containers; all else as it is."""
        if isinstance(value, Tensor):
            if not value.dim() or len(value) not in self._counts:
                return value
            return value.index_select(0, self.index(len(value), value.device))
        if type(value) is dict:
            return {key: self.of(each) for key, each in value.items()}
        if isinstance(value, Mapping):
            return type(value)(**{key: self.of(each) for key, each in value.items()})
        if type(value) in (list, tuple):
            return type(value)(self.of(each) for each in value)
        return value

    def told(self, value: Any) -> Any:
        """Returns its entries of a value that a call gives to a method: of a tensor, or of a list with one for each
        row."""
        if isinstance(value, list | tuple) and len(value) in self._batch:
            return [value[n] for n in self.index(len(value), torch.device("cpu")).tolist()]
        return self.of(value)

    def spread(self, value: Any) -> Any:
        """Returns a value of its rows as one of all rows; zeros stand for the others."""
        if isinstance(value, Tensor) and value.dim():
            for count in sorted(self._counts):
                own = self.index(count, value.device)
                if len(own) == len(value):
                    return value.new_zeros(count, *value.shape[1:]).index_copy(0, own, value)
        if type(value) in (list, tuple):
            return type(value)(self.spread(each) for each in value)
        return value


class OfSomeRows:
    """A forward of some rows of a batch: it picks them from one forward of all rows that want the same, as long as
    nobody changes its inputs.

    Args:
        whole: that forward, of the bare base model.
        given: its arguments, by position and by name.
        pick: returns the rows from arguments and outputs of it.
        alone: whether the rows run by themselves, since others do that need not run the bare base model.
    """

    def __init__(
        self, whole: OneForward, given: tuple[tuple[Any, ...], dict[str, Any]], pick: OwnRows, alone: bool = False
    ) -> None:
        self._whole, self._given, self._pick, self._alone = whole, given, pick, alone
        args, kwargs = given
        self.args = tuple(pick.of(each) for each in args)
        self.kwargs = {name: pick.of(each) for name, each in kwargs.items()}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the output for its rows.

        Raises:
            RouteError: inputs were changed of a module with others inside, which would run more than once.
        """
        if self._alone:
            return self._whole.run(*args, **kwargs)
        if _same((self.args, self.kwargs), args, kwargs):
            with all_rows():
                return self._pick.of(self._whole(*self._given[0], **self._given[1]))
        return self._whole.changed(*args, **kwargs)


def _same(before: tuple[tuple[Any, ...], dict[str, Any]], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    positional, named = before
    alike = len(args) == len(positional) and kwargs.keys() == named.keys()
    return (
        alike
        and all(a is b for a, b in zip(args, positional, strict=True))
        and all(value is named[key] for key, value in kwargs.items())
    )


@contextmanager
def own_rows(rows: OwnRows | None, site: str = "") -> Iterator[None]:
    """Context manager in which operators see the rows of one injection alone: in what taps hold, in what a call told
    and in the model's inputs; they draw by the injection's own seed, where the route has one.

    Args:
        rows: the rows; None for all of them, where the model draws as it always does.
        site: the module, and what operators do there, by which draws differ.
    """
    context = forward_context()
    outer, context.rows = context.rows, rows
    try:
        if rows is None and context.drawn is not None:
            with own_draws_aside(context):
                yield
        elif rows is not None and rows.route.seeds:
            with draws_of(context, rows.route, rows.position, site):
                yield
        else:  # as nearly always
            yield
    finally:
        context.rows = outer


def all_rows() -> AbstractContextManager[None]:
    """Returns the context manager in which modules see all rows again."""
    return own_rows(None)


def rows_seen(route: Route, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """Returns how many rows a module sees, by the first tensor among its arguments; None where they cannot be told
    apart: one stands for all."""
    first = next((each for each in (*args, *kwargs.values()) if isinstance(each, Tensor) and each.dim()), None)
    if first is None or len(first) < 2 or len(first) % len(route.index):
        return None
    return len(first)


def put_together(parts: Mapping[int, Any], route: Route, count: int) -> Any:
    """Returns the outputs for the rows of each position of a route as one output, row by row; containers may be nested.
    What has no rows is the first one's."""
    first = next(iter(parts.values()))
    if isinstance(first, Tensor):
        if not first.dim() or len(parts) == 1:
            return first
        found = {divmod(len(part), len(route.groups(count, part.device)[0][n])) for n, part in parts.items()}
        times, rest = found.pop()
        if found or rest or not times:
            return first
        order = route.groups(count * times, first.device)[1]
        return torch.cat(list(parts.values())).index_select(0, order)
    if isinstance(first, Mapping):
        of_keys = {key: put_together({n: part[key] for n, part in parts.items()}, route, count) for key in first}
        return type(first)(**of_keys)
    if isinstance(first, list | tuple):
        return type(first)(put_together(dict(zip(parts, each, strict=True)), route, count)
                           for each in zip(*parts.values(), strict=True))  # fmt: skip
    return first


def select_rows(output: Any, other: Any, route: Route, position: int) -> Any:
    """Returns `output` with the rows of the injection at `position` taken from `other`; both may be nested containers
    of tensors.

    Raises:
        RouteError: the rows of a tensor cannot be told apart.
    """
    if isinstance(output, Tensor):
        if output is other or not output.dim():
            return output
        if len(output) == 1 and len(other) == 1:  # shared by all rows: one for each from here on
            chosen = route.index.to(output.device) == position
        else:
            chosen = route.rows(max(len(output), len(other)), output.device) == position
        return torch.where(chosen.view(-1, *[1] * (output.dim() - 1)), other, output)
    if isinstance(output, Mapping):
        changed = {key: select_rows(value, other[key], route, position) for key, value in output.items()}
        return type(output)(**changed)
    if isinstance(output, list | tuple):
        return type(output)(select_rows(a, b, route, position) for a, b in zip(output, other, strict=True))
    return output
