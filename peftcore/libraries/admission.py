"""Quantized models that transformers' Trainer is to train: it refuses them, since it knows no adapters but peft's.

The Trainer reads a mark on the model, and nothing else of the kind, before it looks at its callbacks. An adapted
model says yes there as long as a callback that has been made waits for a Trainer, and no otherwise: without the
callback, checkpoints of quantized weights could not be written or not be read.
"""

from __future__ import annotations

import weakref
from contextvars import ContextVar
from typing import Any, Protocol, runtime_checkable

from peftcore.libraries.instance_methods import InstanceMethod

_WAITING: ContextVar[weakref.ref[Any] | None] = ContextVar("waiting_for_trainer", default=None)
"""The callback that was made last in this context, and has not met its Trainer."""


def await_trainer(callback: object) -> None:
    """Let the next Trainer that this thread makes train quantized models that are adapted. A callback that is gone
    waits no longer."""
    _WAITING.set(weakref.ref(callback))


def has_trainer() -> None:
    """End `await_trainer`."""
    _WAITING.set(None)


@runtime_checkable
class TakesAdapters(Protocol):
    """A model that peft's adapters can be put on by its own methods, as those of transformers."""

    def add_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Put one on."""

    def enable_input_require_grads(self) -> Any:
        """Let gradients through frozen embeddings."""


class Admitted(InstanceMethod):
    """The mark of a model with adapters of peft, on a model with ours: true while a Trainer is awaited. Left true,
    transformers would save adapters of peft in place of the model."""

    name = "_hf_peft_config_loaded"
    having = TakesAdapters

    def __bool__(self) -> bool:
        waiting = _WAITING.get()
        return waiting is not None and waiting() is not None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Never called: it is a mark.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"{self.name} is no function")
