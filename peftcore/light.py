"""torch's module, made in half of the time: an adapted host gets hundreds or thousands of them.

Afterwards it is what torch makes; `tests/core/test_light.py` holds one against the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.modules import module as torchs

_OWN = vars(nn.Module())
_TABLES = {name: type(value) for name, value in _OWN.items() if isinstance(value, dict | set | list)}
"""What torch keeps in a module, empty at first: parameters, modules, hooks."""
_HOOKS = {name: make for name, make in _TABLES.items() if "_hooks" in name}
_OTHERS = {name: make for name, make in _TABLES.items() if name not in _HOOKS}
_PLAIN = {name: value for name, value in _OWN.items() if name not in _TABLES}
REGISTERED = (Tensor, nn.Module)
"""What torch may keep in a table of its own."""


class _Table:
    """A table of hooks, which a module has from when somebody first asks for it. Most never hear that question, and
    eleven empty tables are half of what a module takes, in time and in memory."""

    def __init__(self, name: str, make: Callable[[], Any]) -> None:
        self._name, self._make = name, make

    def __get__(self, module: nn.Module | None, cls: Any = None) -> Any:
        if module is None:
            return self
        if is_dynamo_compiling():  # nobody hooks in a graph
            return self._make()
        return module.__dict__.setdefault(self._name, self._make())


@functools.cache
def names_of(cls: Any) -> frozenset[str]:
    """The attributes of a class."""
    return frozenset(dir(cls))


class LightModule(nn.Module):
    """`nn.Module`, with a constructor and attributes that cost less."""

    _peftcore_names: frozenset[str]
    """The attributes of the class."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        made: Any = cls
        cls._peftcore_names = names_of(made)

    def __init__(self) -> None:
        own = self.__dict__
        own.update(_PLAIN)
        for name, make in _OTHERS.items():  # torch sets each as an attribute
            own[name] = make()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. Of plain data under a new name torch finds out, step by step, that it is plain; of a
        parameter, that nothing stands in its way."""
        own = self.__dict__
        if is_dynamo_compiling() or "_parameters" not in own or name in own or name in self._peftcore_names:
            return super().__setattr__(name, value)
        if name in own["_parameters"] or name in own["_buffers"] or name in own["_modules"]:
            return super().__setattr__(name, value)
        if not isinstance(value, REGISTERED):
            own[name] = value
        elif type(value) is nn.Parameter and _registers(name, value):
            own["_parameters"][name] = value
        else:
            super().__setattr__(name, value)
        return None


def _registers(name: str, value: nn.Parameter) -> bool:
    """Whether torch would take a parameter, and tell nobody."""
    return name.isidentifier() and value.grad_fn is None and not torchs._global_parameter_registration_hooks


for _name, _make in _HOOKS.items():
    setattr(LightModule, _name, _Table(_name, _make))
LightModule._peftcore_names = names_of(LightModule)
