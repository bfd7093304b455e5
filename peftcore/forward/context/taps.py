"""Taps: values that one operator stores for another in the same forward."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from peftcore.errors import TrainingError
from peftcore.forward.context.activation_checkpoints import reentrant
from peftcore.forward.context.context import ForwardContext, forward_context, tensors_in

if TYPE_CHECKING:
    from peftcore.forward.rows.routing import OwnRows

REENTRANT = (
    "a checkpointed block reads a tensor from another part of the adapter, and reentrant checkpoints give it no "
    "gradient: call model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
)


class Tap:
    """An object through which one operator passes a value to another during one forward. Both operators have it as an
    attribute.

    Args:
        until_backward: whether to keep the value until backward is done with this forward. Needed for operators in
            different blocks, because gradient checkpointing repeats one block without the other.
        learns: whether values need gradients from the code that reads them. A value that was stored in a reentrant
            checkpoint loses its graph outside of it, so reading it there raises a TrainingError.
    """

    _numbers = itertools.count()

    def __init__(self, *, until_backward: bool = False, learns: bool = False) -> None:
        self.key, self.until_backward, self.learns = next(self._numbers), until_backward, learns

    def put(self, value: Any) -> None:
        """Store a value for the rest of this forward."""
        context = forward_context()
        lost = _loses_gradient(value) or (self.learns and not torch.is_grad_enabled())
        inside = reentrant() if lost and not torch.compiler.is_compiling() else None
        context.taps.append((self.key, value, self.until_backward, context.rows, inside))

    def get(self) -> Any:
        """Returns the value that was stored in this forward; otherwise None.

        Raises:
            TrainingError: the gradient of the value would be lost, because a reentrant checkpoint begins or ends
                between storing and reading it.
        """
        context = forward_context()
        for key, value, _, rows, inside in reversed(context.taps):
            if key == self.key:
                if _loses_gradient(value) and (here := reentrant()) is not None and here != inside:
                    raise TrainingError(REENTRANT)
                if self.learns and inside is not None and reentrant() != inside:
                    raise TrainingError(REENTRANT)
                return value if rows is context.rows else _for_rows(value, rows, context.rows)
        return None

    def take(self) -> Any:
        """Returns the value like `get`, and deletes it, so that its memory is freed after use."""
        value, taps = self.get(), forward_context().taps
        taps[:] = [tap for tap in taps if tap[0] != self.key]
        return value

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, key=next(self._numbers))  # a number of another process may be taken in this one


@contextmanager
def branches(context: ForwardContext) -> Iterator[Callable[[], None]]:
    """Context manager for a module that runs once for each branch of a composition. Yields a function to call before
    each branch. So each branch reads the values that were stored before the module ran, even if an earlier branch has
    deleted them."""
    taps, before = context.taps, [*context.taps]
    left: list[Any] = []
    taken: list[Any] = []

    def begin() -> None:
        left.extend(_others(taps, before))
        taken.extend(_others(before, taps))
        taps[:] = before

    try:
        yield begin
    finally:
        begin()
        taps[:] = [*_others(before, taken), *left]


def _others(taps: Sequence[Any], than: Sequence[Any]) -> list[Any]:
    return [tap for tap in taps if all(tap is not each for each in than)]


def _loses_gradient(value: Any) -> bool:
    """Whether a value requires a gradient while gradients are not recorded, as in the forward of reentrant
    checkpoints."""
    return not torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors_in(value))


def _for_rows(value: Any, rows: OwnRows | None, wanted: OwnRows | None) -> Any:
    """Returns a value that was stored for some rows, converted to the rows of the operator that reads it."""
    if rows is not None and wanted is not None and rows.positions == wanted.positions:
        return value
    whole = value if rows is None else rows.spread(value)
    return whole if wanted is None else wanted.of(whole)
