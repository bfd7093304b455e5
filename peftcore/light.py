"""torch's module, made in half of the time: an adapted host gets hundreds or thousands of them.

Afterwards it is what torch makes; `tests/core/test_light.py` holds one against the other.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torchs

_OWN = vars(nn.Module())
_TABLES = [(name, type(value)) for name, value in _OWN.items() if isinstance(value, dict | set | list)]
"""What torch keeps in a module, empty at first: parameters, modules, hooks."""
_REST = {name: value for name, value in _OWN.items() if not isinstance(value, dict | set | list)}


@functools.cache
def names_of(cls: Any) -> frozenset[str]:
    """The attributes of a class."""
    return frozenset(dir(cls))


class LightModule(nn.Module):
    """`nn.Module`, with a constructor and attributes that cost less."""

    def __init__(self) -> None:
        own = self.__dict__
        own.update(_REST)
        for name, make in _TABLES:  # torch sets each as an attribute
            own[name] = make()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. Of plain data under a new name torch finds out, step by step, that it is plain; of a
        parameter, that nothing stands in its way."""
        own = self.__dict__
        known = name in own.get("_parameters", ()) or name in own.get("_buffers", ()) or name in own.get("_modules", ())
        if known or isinstance(value, nn.Module):
            super().__setattr__(name, value)
        elif not isinstance(value, Tensor):
            object.__setattr__(self, name, value)
        elif type(value) is nn.Parameter and self._is_free(name) and value.grad_fn is None:
            own["_parameters"][name] = value
        else:
            super().__setattr__(name, value)

    def _is_free(self, name: str) -> bool:
        """Whether torch would put a parameter under this name, and tell nobody."""
        cls: Any = type(self)
        own = self.__dict__
        unknown = name not in own and name not in names_of(cls) and name.isidentifier()
        return unknown and "_parameters" in own and not torchs._global_parameter_registration_hooks
