"""Rows of a batch that go to different injections: one base forward for all of them, and one output put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftcore.contract.operators import Factors
from peftcore.errors import RouteError
from peftcore.forward.choice import Route
from peftcore.forward.mount import Mount
from peftcore.layers.layer import put, take


class OneForward:
    """A forward that runs once for the same inputs, however many ask for its output.

    Args:
        run: the forward.
        module: the module whose forward it is. Where that has modules inside, other inputs raise a RouteError: they
            would fill caches more than once.
    """

    def __init__(self, run: Callable[..., Any], module: nn.Module) -> None:
        self.run, self._module = run, module
        self._asked: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._output: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._asked is None:
            self._asked, self._output = (args, kwargs), self.run(*args, **kwargs)
            return self._output
        if self._same(args, kwargs):
            return self._output
        if self._module._modules:
            raise RouteError(
                f"an injection changes the inputs of a whole {type(self._module).__name__}, which would have to run "
                "once for each injection of the route (and fill caches more than once); route without it"
            )
        return self.run(*args, **kwargs)

    def _same(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        assert self._asked is not None
        before, named = self._asked
        alike = len(args) == len(before) and kwargs.keys() == named.keys()
        return (
            alike
            and all(a is b for a, b in zip(args, before, strict=True))
            and all(value is named[key] for key, value in kwargs.items())
        )


class OfSomeRows:
    """A forward of some rows of a batch: those of one forward of all rows, as long as nobody changes what goes in."""

    def __init__(self, whole: OneForward, x: Tensor, own: Tensor) -> None:
        self._whole, self._x, self._own = whole, x, own
        self.rows = x.index_select(0, own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and args[0] is self.rows and not kwargs:
            return self._whole(self._x).index_select(0, self._own)
        return self._whole.run(*args, **kwargs)


def each_its_own(
    route: Route, x: Tensor, whole: OneForward, act: Callable[[int, OfSomeRows], Callable[[Tensor], Tensor]]
) -> Tensor:
    """What a forward of their own makes of the rows of each position of a route, ``[rows, ..., out]``.

    Args:
        route: which rows are whose.
        x: ``[rows, ..., in]``.
        whole: the bare base model. It sees all rows, as without a route: its own come out the same to the bit.
        act: what acts on the rows of a position, around such a forward.
    """
    places, order = route.groups(len(x), x.device)
    made = []
    for position, own in places.items():
        bare = OfSomeRows(whole, x, own)
        made.append((act(position, bare) if position >= 0 else bare)(bare.rows))
    return torch.cat(made).index_select(0, order)


def add_updates(updates: Sequence[tuple[int, Mount]], route: Route, y: Tensor, x: Tensor, new: bool = False) -> Tensor:
    """Low-rank updates of several injections, each of its own rows: two products for all of them.

    Args:
        updates: mounts whose operators are low-rank updates of vectors, with the positions of their injections.
        route: which rows are whose.
        y: what the module returns without them ``[rows, ..., out]``.
        x: its input ``[rows, ..., in]``.
        new: whether `y` is nobody else's, so that they may be added in place.
    """
    tokens = x.reshape(len(x), -1, x.shape[-1])
    for slices in dict.fromkeys(mount.slices for _, mount in updates):
        factors = {position: mount.operator.factors() for position, mount in updates if mount.slices == slices}
        A, B, scales = _of_rows(factors, route, len(x), y)  # type: ignore[arg-type]
        low = (tokens.to(y.dtype) @ A.mT) * scales.view(-1, 1, 1)
        if new and slices is None and type(y) is Tensor and y.is_contiguous():
            y.view(len(x), -1, y.shape[-1]).baddbmm_(low, B.mT)
            continue
        part = take(y, slices, -1)
        changed = torch.baddbmm(part.reshape(len(x), -1, part.shape[-1]), low, B.mT)
        y = put(y, changed.view(part.shape), slices, -1)
    return y


def _of_rows(factors: Mapping[int, Factors], route: Route, count: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A ``[count, rank, in]``, B ``[count, out, rank]`` and a scale for each of `count` rows; zeros for those of the
    bare base, and of what does nothing here. Lower ranks are filled up."""
    first, second, _ = next(iter(factors.values()))
    rank = max(len(A) for A, _, _ in factors.values())
    nothing = first.new_zeros(rank, first.shape[1]), second.new_zeros(len(second), rank), 0.0
    each = [_filled(factors[n], rank) if n in factors else nothing for n in range(len(route.names))] + [nothing]
    index = route.rows(count, like.device)
    laid = not torch.compiler.is_compiling() and bool(route.positions)  # no graph may depend on who is where
    if laid:  # side by side at once, not one of each first and then by row
        times = count // len(route.positions)
        each = [each[n] for n in route.positions for _ in range(times)]
    As, Bs, scales = (list(part) for part in zip(*each, strict=True))
    A, B, scale = torch.stack(As).to(like.dtype), torch.stack(Bs).to(like.dtype), like.new_tensor(scales)
    return (A, B, scale) if laid else (A[index], B[index], scale[index])


def _filled(factors: Factors, rank: int) -> Factors:
    A, B, scale = factors
    lacking = rank - len(A)
    return (F.pad(A, (0, 0, 0, lacking)), F.pad(B, (0, lacking)), scale) if lacking else factors


def select_rows(output: Any, other: Any, route: Route, position: int) -> Any:
    """`output`, with the rows that go to the injection at `position` taken from `other`; whatever holds tensors.

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
