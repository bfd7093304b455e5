"""Per-sample adapters: rows of a batch go to different injections, over one base forward where possible."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.errors import RouteError
from peftcore.forward.active_adapters import Route
from peftcore.forward.context import HERE, ForwardContext


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


def _running() -> ForwardContext | None:
    return HERE.calls[-1] if HERE.calls else None


class OfSomeRows:
    """A forward of some rows of a batch: it picks them from one forward of all rows, as long as nobody changes its
    input."""

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
    """Run the rows of each position of a route through a forward of their own; returns ``[rows, ..., out]``.

    Args:
        route: which rows are whose.
        x: ``[rows, ..., in]``.
        whole: the bare base model. It sees all rows, as without a route: its own come out the same to the bit.
        act: returns the forward for the rows of a position, around such a forward.
    """
    places, order = route.groups(len(x), x.device)
    made = []
    for position, own in places.items():
        bare = OfSomeRows(whole, x, own)
        made.append((act(position, bare) if position >= 0 else bare)(bare.rows))
    return torch.cat(made).index_select(0, order)


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
