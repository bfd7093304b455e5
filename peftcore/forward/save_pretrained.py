"""Saving an adapted model with other libraries' ``save_pretrained``: it writes the base as it came, and
`Injection.save` writes the adapters.

``state_dict()`` holds all there is, since checkpoints of a training need it. So ``save_pretrained(folder)``, which
transformers, diffusers and hub mixins have, is told apart from it on the instance, as long as the host is adapted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, runtime_checkable

from peftcore.forward.instance_methods import InstanceMethod

BASE_ALONE: ContextVar[bool] = ContextVar("base_alone", default=False)
"""Whether state dicts leave operators out."""


@contextmanager
def saving_base() -> Iterator[None]:
    """Context manager in which state dicts that this thread takes of adapted hosts hold the base alone, under its own
    names.

        with peftcore.saving_base():
            timm.models.save_for_hf(model, "folder")

    Merged injections are in the base's weights, and saved with them.
    """
    token = BASE_ALONE.set(True)
    try:
        yield
    finally:
        BASE_ALONE.reset(token)


@runtime_checkable
class Saves(Protocol):
    """A model with a ``save_pretrained`` method."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Write the model into a folder."""


class SavesBase(InstanceMethod):
    """A ``save_pretrained`` that leaves adapters out. A caller that hands over a state dict (the Trainer, for its
    checkpoints) has said what to save."""

    name = "save_pretrained"
    having = Saves

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if "state_dict" in self.__signature__.bind(*args, **kwargs).arguments:
            return self.plain(*args, **kwargs)
        with saving_base():
            return self.plain(*args, **kwargs)
