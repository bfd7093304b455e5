"""Replaces methods of a model while it is adapted. The method is replaced on the instance, so the class and its other
instances do not change."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from torch import nn

from peftcore.utils.journal import Journal


class InstanceMethod(ABC):
    """A replacement for the method `name` of one model. It is stored as an attribute of the model, and called in place
    of the method."""

    name: ClassVar[str]
    having: ClassVar[type]
    """The protocol that identifies the classes with the method."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.owners: list[object] = []
        """The states of the adapted hosts that need the replacement: the model itself, and models that contain it."""

    @property
    def plain(self) -> Callable[..., Any]:
        """The original method, from the class and bound to the model."""
        bound: Callable[..., Any] = getattr(type(self.model), self.name).__get__(self.model)
        return bound

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.plain)

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the original method, with additional steps before or after it."""


def replace_methods(journal: Journal, modules: Iterable[nn.Module], kind: type[InstanceMethod], owner: object) -> None:
    """Replace the method on each module whose class has it, for one owner (the state of an adapted host). If the
    instance already has another attribute of that name, it is not replaced.

    Args:
        journal: records the changes, so that they can be undone.
        modules: the modules to look through.
        kind: the replacement, with the name of the method.
        owner: the reason for the replacement. Several owners may replace the method; the last one restores it.
    """
    having: dict[type, bool] = {}
    for module in modules:
        cls = type(module)
        if cls not in having:
            having[cls] = issubclass(cls, kind.having)
        if having[cls]:
            if kind.name not in vars(module):
                journal.put(module, "", kind.name, kind(module))
            if isinstance(there := vars(module)[kind.name], kind):
                journal.set(there, "owners", [*there.owners, owner])


def give_methods_back(journal: Journal, model: nn.Module, owner: object) -> None:
    """Undo `replace_methods` of one owner, for the model and its submodules."""
    for module in model.modules():
        for name, each in list(vars(module).items()):
            if isinstance(each, InstanceMethod) and any(one is owner for one in each.owners):
                journal.set(each, "owners", [one for one in each.owners if one is not owner])
                if not each.owners:
                    journal.drop(module, "", name)
