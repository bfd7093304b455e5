"""Rows of a batch that use different injections, with one shared base forward where possible.

There are two strategies. Usually each injection runs only on its rows (`OwnRows`), and the outputs are combined
(`put_together`). If the rows cannot be separated, each injection runs on all rows, and its rows are selected from the
output (`select_rows`). Compiled code always uses the second strategy, because its graph must not depend on the
assignment of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from peftcore.errors import RouteError
from peftcore.forward.choice.active_adapters import Positions, Route
from peftcore.forward.context.context import HERE, ForwardContext, forward_context, tensors_in
from peftcore.forward.context.row_random_numbers import draws_of, own_draws_aside
from peftcore.layers.adapter_modules import has_submodules


class OneForward:
    """A forward that runs once for the same inputs, even if it is called several times.

    In an extra pass (`ForwardContext.without`) it runs again, because other injections act there.

    Args:
        run: the forward.
        module: the module of this forward. If it has submodules, a call with different inputs raises a RouteError,
            because the module would fill caches twice.
    """

    def __init__(self, run: Callable[..., Any], module: nn.Module) -> None:
        self.run, self._module = run, module
        self._context = _running()
        self._asked: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._output: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._kept(args, kwargs, self.run(*args, **kwargs)) if self._is_due(args, kwargs) else self._output

    def _is_due(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the forward has to run for these inputs."""
        if self._asked is None or _running() is not self._context:
            return True
        if _same(self._asked, args, kwargs):
            return False
        self._check_changed()
        return True

    def _kept(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Returns the output, and stores it if it is the first."""
        if self._asked is None and _running() is self._context:
            self._asked, self._output = (args, kwargs), output
        return output

    def changed(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the output for inputs that differ from those of the first call.

        Raises:
            RouteError: the module has submodules.
        """
        self._check_changed()
        return self.run(*args, **kwargs)

    def _check_changed(self) -> None:
        """Check that the module may run again, for different inputs.

        Raises:
            RouteError: the module has submodules.
        """
        if has_submodules(self._module):
            raise RouteError(
                f"an adapter changes the inputs of {type(self._module).__name__}, a module with submodules, which "
                "would run once for each adapter of the route or composition (and fill caches more than once): remove "
                "that adapter"
            )


def _running() -> ForwardContext | None:
    return HERE.calls[-1] if HERE.calls else None


class OwnRows:
    """The rows of one injection of a route, while an operator of this injection runs. If several equal injections run
    as one, their rows. If a value has one row per row of the batch or of the module's input, the operator receives only
    these rows of it.

    Args:
        route: the route.
        positions: the positions of the injections in the route; -1 for the rows of the base model. Their rows are
            concatenated in this order.
        count: the number of rows of the module's input, a multiple of the route's rows.
    """

    def __init__(self, route: Route, positions: Positions, count: int) -> None:
        self.route, self.positions, self.count = route, positions, count
        self._batch = {len(route.index), len(route.index) * route.copies, len(route.index) // max(route.tokens, 1)}
        self._counts = {count, *self._batch}

    def of(self, value: Any) -> Any:
        """Returns the injection's rows of a tensor, or of each tensor in nested containers. Other values are returned
        unchanged."""
        return of_tensors(self._of, value)

    def _of(self, tensor: Tensor) -> Tensor:
        if not tensor.dim() or len(tensor) not in self._counts:
            return tensor
        index = self.route.own(self.positions, len(tensor), tensor.device)
        return tensor if index is None else tensor.index_select(0, index)

    def of_tokens(self, value: Tensor) -> Tensor:
        """Returns the injection's rows of a tensor ``[batch, tokens]``. With a route of single tokens, returns the
        injection's tokens ``[own]``."""
        if self.route.tokens > 1:
            value = value.flatten()
        index = self.route.own(self.positions, len(value), value.device)
        return value if index is None else value.index_select(0, index)

    def told(self, value: Any) -> Any:
        """Returns the entries for the injection's rows, from a value that the user passed to `peftcore.call`. The value
        is a tensor or a list with one entry per row."""
        if isinstance(value, list | tuple) and len(value) in self._batch:
            index = self.route.own(self.positions, len(value), torch.device("cpu"))
            return [*value] if index is None else [value[n] for n in index.tolist()]
        return self.of(value)

    def spread(self, value: Any) -> Any:
        """Returns a value for all rows of the batch, given a value for the injection's rows. The other rows are
        zero."""
        return of_tensors(self._spread, value)

    def _spread(self, tensor: Tensor) -> Tensor:
        for count in sorted(self._counts) if tensor.dim() else ():
            own = self.route.own(self.positions, count, tensor.device)
            if own is None:
                return tensor
            if len(own) == len(tensor):
                return tensor.new_zeros(count, *tensor.shape[1:]).index_copy(0, own, tensor)
        return tensor


class OfSomeRows:
    """A forward of some rows of a batch. As long as no operator changes the inputs, it selects these rows from the
    output of one shared forward of all rows.

    Args:
        whole: the shared forward, which runs the base model.
        given: the arguments of the shared forward, by position and by name.
        pick: selects the rows from arguments and outputs.
    """

    def __init__(self, whole: OneForward, given: tuple[tuple[Any, ...], dict[str, Any]], pick: OwnRows) -> None:
        self._whole, self._given, self._pick = whole, given, pick
        self.given: tuple[tuple[Any, ...], dict[str, Any]] = pick.of(given)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the output for these rows.

        Raises:
            RouteError: an operator changed the inputs of a module with submodules, which would have to run more than
                once.
        """
        whole = self._whole
        if not _same(self.given, args, kwargs):
            whole._check_changed()
            return whole.run(*args, **kwargs)
        args, kwargs = self._given
        with own_rows(None):  # as `whole(*args, **kwargs)`, without its frame in tracebacks
            due = whole._is_due(args, kwargs)
            output = whole._kept(args, kwargs, whole.run(*args, **kwargs)) if due else whole._output
            return self._pick.of(output)


def _same(before: tuple[tuple[Any, ...], dict[str, Any]], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    positional, named = before
    alike = len(args) == len(positional) and kwargs.keys() == named.keys()
    return (
        alike
        and all(a is b for a, b in zip(args, positional, strict=True))
        and all(value is named[key] for key, value in kwargs.items())
    )


@contextmanager
def own_rows(rows: OwnRows | None, site: str | None = None) -> Iterator[None]:
    """Context manager in which operators see only the rows of one injection: in the values of taps (values that
    operators store for each other), in the values of `peftcore.call` and in the model's inputs. If the route has a seed
    for the injection, random numbers are drawn from it.

    Args:
        rows: the rows; None for all rows, with the model's own random numbers.
        site: the path of the module and the kind of operation, on which random numbers depend in addition to the seed.
            None if operators do not draw random numbers.
    """
    context = forward_context()
    outer = context.rows
    try:
        context.rows = rows
        if rows is None and context.drawn is not None:
            with own_draws_aside(context):
                yield
        elif rows is not None and site is not None and rows.route.seeds and len(rows.positions) == 1:
            with draws_of(context, rows.route, rows.positions[0], site, alone=True):
                yield
        else:  # as nearly always
            yield
    finally:
        context.rows = outer


def rows_seen(route: Route, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """Returns the number of rows of a module's input, read from the first tensor among its arguments. None if the rows
    cannot be separated: all rows of the batch share one row, or it is unclear which other arguments have rows."""
    first = next((each for each in (*args, *kwargs.values()) if isinstance(each, Tensor) and each.dim()), None)
    if first is None or len(first) < 2 or len(first) % len(route.index):
        return None
    alone = len(args) == 1 and not kwargs
    return len(first) if alone or told_apart(route, len(first), first, (args, kwargs)) else None


def told_apart(route: Route, count: int, first: Tensor, others: Any) -> bool:
    """Whether it is certain which of a module's other arguments have one entry per row.

    This matters for arguments whose first dimension has the length of the batch. It is certain for tensors of four
    dimensions or more, such as a mask ``[rows, heads, tokens, tokens]``. It is certain for tensors of three dimensions
    with the same last dimension as a three-dimensional first argument. Other tensors could be a mask ``[tokens,
    tokens]``, angles ``[tokens, width]`` or a number for each head. For them it is certain only if all other dimensions
    of all arguments differ from the length of the batch.
    """
    every = [each for each in tensors_in(others) if each.dim() and each is not first]
    lengths = {count, len(route.index), len(route.index) * route.copies}
    long = {len(each) for each in every if not _has_rows(each, first)} & lengths
    return not long or long.isdisjoint({*first.shape[1:], *(size for each in every for size in each.shape[1:])})


def _has_rows(tensor: Tensor, first: Tensor) -> bool:
    return tensor.dim() > 3 or (tensor.dim() == first.dim() == 3 and tensor.shape[-1] == first.shape[-1])


def by_tokens(
    route: Route, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Route, tuple[Any, ...], dict[str, Any], Callable[[Any], Any]]:
    """Returns the arguments of a module with each token as a row, for a route that begins at certain tokens (`since`).

    Args:
        route: the route, which has `since`.
        args: the module's arguments. Tensors ``[batch, tokens, ...]`` become ``[batch * tokens, ...]``.
        kwargs: the keyword arguments, converted in the same way.

    Returns:
        The route of single tokens, the positional arguments, the keyword arguments, and a function that restores the
            usual
        shape of the output.

    Raises:
        MissingContext: the user called a part of the model directly.
        RouteError: the tokens of the module cannot be identified, or the code is compiled.
    """
    counted = forward_context().tokens
    first = next((each for each in (*args, *kwargs.values()) if isinstance(each, Tensor) and each.dim()), None)
    if first is None or torch.compiler.is_compiling():
        raise RouteError(
            "a route with `since` needs an uncompiled model and modules that receive tokens: omit since= to route "
            "whole rows"
        )
    held, new = counted.held, counted.new
    batch = len(first) if first.shape[1:2] == (new,) and route.fits(len(first)) else len(first) // new
    if not route.fits(batch) or len(first) not in (batch, batch * new):
        raise RouteError(
            f"a module received a tensor of shape {tuple(first.shape)}, in which the {new} tokens of "
            f"{len(route.index)} rows cannot be identified: exclude it from the adapter's target modules, or omit "
            "since= to route whole rows"
        )
    tokens = route.by_tokens(held, new, batch)
    if not tokens.tokens or len(first) == batch * new:
        return tokens, args, kwargs, _as_it_is

    def flat(value: Any) -> Any:
        is_of_tokens = isinstance(value, Tensor) and value.shape[:2] == (batch, new)
        return value.flatten(0, 1) if is_of_tokens else value

    def restore(output: Any) -> Any:
        return tree_map_only(Tensor, lambda each: each.unflatten(0, (batch, new)), output)

    return tokens, tuple(map(flat, args)), {name: flat(each) for name, each in kwargs.items()}, restore


def _as_it_is(output: Any) -> Any:
    return output


def put_together(parts: Mapping[Any, Any], route: Route) -> Any:
    """Returns one output that contains the rows of all `parts`, in the order of the batch. Outputs may be nested
    containers. Values without rows are those of the first part."""
    sizes = [sum(route.sizes[each] for each in own) for own in parts]

    def join(*tensors: Tensor) -> Tensor:
        first = tensors[0]
        if not first.dim():
            return first
        found = {divmod(len(part), size) for part, size in zip(tensors, sizes, strict=True)}
        times, rest = found.pop()
        if found or rest or not times:
            return first
        order = route.order(tuple(parts), len(route.positions) * times, first.device)
        whole = torch.cat(tensors) if len(tensors) > 1 else first
        return whole if order is None else whole.index_select(0, order)

    return of_tensors(join, *parts.values())


def select_rows(output: Any, other: Any, route: Route, position: int) -> Any:
    """Returns `output` in which the rows of the injection at `position` are replaced by those of `other`. Both may be
    nested containers of tensors.

    Raises:
        RouteError: the number of rows of a tensor does not match the route.
    """

    def select(output: Tensor, other: Tensor) -> Tensor:
        if output is other or not output.dim():
            return output
        if len(output) == 1 and len(other) == 1:  # shared by all rows: one for each from here on
            chosen = route.index.to(output.device) == position
        else:
            chosen = route.rows(max(len(output), len(other)), output.device) == position
        return torch.where(chosen.view(-1, *[1] * (output.dim() - 1)), other, output)

    return of_tensors(select, output, other)


def of_tensors(function: Callable[..., Tensor], *values: Any) -> Any:
    """Returns the output of a function of tensors. If the values are nested containers of the same structure, applies
    the function to their tensors place by place. Other values are those of the first container."""
    first = values[0]
    if isinstance(first, Tensor):
        return function(*values)
    if isinstance(first, Mapping):
        of_keys = {key: of_tensors(function, *(each[key] for each in values)) for key in first}
        return of_keys if type(first) is dict else type(first)(**of_keys)
    if isinstance(first, list | tuple):
        each = [of_tensors(function, *parts) for parts in zip(*values, strict=True)]
        return type(first)(*each) if getattr(type(first), "_fields", None) else type(first)(each)
    return first
