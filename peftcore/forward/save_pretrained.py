"""Saving an adapted model with other libraries' ``save_pretrained``: it writes the base as it came, and
`Injection.save` writes the adapters.

``state_dict()`` holds all there is, since checkpoints of a training need it. So ``save_pretrained(folder)``, which
transformers, diffusers and hub mixins have, is told apart from it on the instance, as long as the host is adapted.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, runtime_checkable

from torch import nn

BASE_ALONE: ContextVar[bool] = ContextVar("base_alone", default=False)
"""Whether state dicts leave operators out."""
NAME = "save_pretrained"


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


class SavesBase:
    """Replaces the ``save_pretrained`` of the class on an instance. A caller that hands over a state dict (the Trainer,
    for its checkpoints) has said what to save."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def _plain(self) -> Callable[..., Any]:
        """The ``save_pretrained`` of the class, bound to the instance."""
        bound: Callable[..., Any] = getattr(type(self.model), NAME).__get__(self.model)
        return bound

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._plain)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Save as the class does, without adapters unless a state dict is given."""
        if "state_dict" in self.__signature__.bind(*args, **kwargs).arguments:
            return self._plain(*args, **kwargs)
        with saving_base():
            return self._plain(*args, **kwargs)


def guard(modules: Collection[nn.Module]) -> None:
    """Let the models among these modules of a host save themselves without adapters from now on."""
    saving: set[type] = {cls for cls in set(map(type, modules)) if issubclass(cls, Saves)}
    for module in modules if saving else ():
        if type(module) in saving and NAME not in vars(module):
            vars(module)[NAME] = SavesBase(module)


def unguard(model: nn.Module) -> None:
    """Undo `guard`."""
    for module in model.modules():
        if isinstance(vars(module).get(NAME), SavesBase):
            del vars(module)[NAME]
