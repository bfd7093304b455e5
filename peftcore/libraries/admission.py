"""Makes transformers' Trainer accept adapted quantized models. By default it rejects them, because it recognizes only
adapters of peft.

A new Trainer first reads the attribute ``_hf_peft_config_loaded`` of the model, which says whether the model has
adapters of peft. On adapted models, this module makes the attribute true from the creation of a peftcore callback until
that callback's Trainer exists. Without the callback it is false, because the Trainer could neither write nor read
checkpoints of quantized weights.
"""

from __future__ import annotations

import weakref
from contextvars import ContextVar
from typing import Any, Protocol, runtime_checkable

from peftcore.libraries.instance_methods import InstanceMethod

_WAITING: ContextVar[weakref.ref[Any] | None] = ContextVar("waiting_for_trainer", default=None)
"""The last callback that was created in this context and does not have a Trainer yet."""


def await_trainer(callback: object) -> None:
    """Make the next Trainer that this thread creates accept adapted quantized models. It ends with `has_trainer`, or
    when the callback is deleted."""
    _WAITING.set(weakref.ref(callback))


def has_trainer() -> None:
    """End the effect of `await_trainer`. Called when the Trainer of the callback exists."""
    _WAITING.set(None)


@runtime_checkable
class TakesAdapters(Protocol):
    """A model that can add adapters of peft, like the models of transformers."""

    def add_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Add an adapter of peft."""

    def enable_input_require_grads(self) -> Any:
        """Make the outputs of frozen embeddings require gradients."""


class Admitted(InstanceMethod):
    """Replaces the attribute ``_hf_peft_config_loaded`` of a model with adapters of peftcore, which says whether the
    model has adapters of peft. It is true only while a new callback does not have a Trainer yet. If it were always
    true, transformers would save adapters of peft instead of the model."""

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
