"""Replaces methods of a model while it is adapted. A method is replaced on the instance, so the class and other models
of the class do not change."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from torch import nn

from peftcore.utils.journal import Journal


class InstanceMethod(ABC):
    """Replaces the method `name` on an instance of a class that has it."""

    name: ClassVar[str]
    having: ClassVar[type]
    """The protocol of classes that have the method."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.owners: list[object] = []
        """The states of the hosts to which the model belongs: the model itself and models that contain it."""

    @property
    def plain(self) -> Callable[..., Any]:
        """The method of the class, bound to the instance."""
        bound: Callable[..., Any] = getattr(type(self.model), self.name).__get__(self.model)
        return bound

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.plain)

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the method of the class, with the steps before and after it."""


def replace_methods(journal: Journal, modules: Iterable[nn.Module], kind: type[InstanceMethod], owner: object) -> None:
    """Replace the method on each module whose class has it, unless the instance already has an attribute of that
    name."""
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
    """Undo `replace_methods` of this owner, for the model and its submodules."""
    for module in model.modules():
        for name, each in list(vars(module).items()):
            if isinstance(each, InstanceMethod) and any(one is owner for one in each.owners):
                journal.set(each, "owners", [one for one in each.owners if one is not owner])
                if not each.owners:
                    journal.drop(module, "", name)
