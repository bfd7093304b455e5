"""Makes transformers' Trainer accept adapted quantized models, which it rejects because it only knows adapters of peft.

Before the Trainer processes its callbacks, it reads one attribute of the model, which declares that the model has
adapters of peft. On an adapted model the attribute is true while a new callback of peftcore waits for its Trainer, and
false otherwise: without the callback, checkpoints of quantized weights could not be written or read.
"""

from __future__ import annotations

import weakref
from contextvars import ContextVar
from typing import Any, Protocol, runtime_checkable

from peftcore.libraries.instance_methods import InstanceMethod

_WAITING: ContextVar[weakref.ref[Any] | None] = ContextVar("waiting_for_trainer", default=None)
"""The last callback that was created in this context, until it is passed to a Trainer."""


def await_trainer(callback: object) -> None:
    """Let the next Trainer that this thread creates train adapted quantized models. This ends when the callback is
    deleted."""
    _WAITING.set(weakref.ref(callback))


def has_trainer() -> None:
    """End `await_trainer`: the Trainer of the callback exists now."""
    _WAITING.set(None)


@runtime_checkable
class TakesAdapters(Protocol):
    """A model with methods that add adapters of peft, like models of transformers."""

    def add_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Add an adapter of peft."""

    def enable_input_require_grads(self) -> Any:
        """Let gradients through frozen embeddings."""


class Admitted(InstanceMethod):
    """The attribute that declares that a model has adapters of peft, on a model with adapters of peftcore: true while a
    callback waits for its Trainer. If it stayed true, transformers would save adapters of peft instead of the model."""

    name = "_hf_peft_config_loaded"
    having = TakesAdapters

    def __bool__(self) -> bool:
        waiting = _WAITING.get()
        return waiting is not None and waiting() is not None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Never called: the Trainer only reads the attribute.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"{self.name} is not a function")
