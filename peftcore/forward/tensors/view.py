"""A view of a module: an object of the module's plain class that shares its `__dict__`, except for some tensors and
attributes.

The base forward runs on a view with effective tensors. So no flag has to be set on the module. An exception could leave
a flag set, and another thread could read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from peftcore.layers.layer import SLOT, plain_class

TORCHS = frozenset(vars(nn.Module()))
"""The attributes that `nn.Module.__init__` sets."""


def with_tensors(module: nn.Module, tensors: Mapping[str, Tensor | None]) -> nn.Module:
    """Returns a view of a module: an object that computes like the module, with some tensors replaced. The module
    itself does not change.

    Args:
        module: the module. Injections at the module itself do not act in the view; injections at its submodules do.
        tensors: the new tensors, by path of the replaced parameter below the module. Gradients flow through them.
    """
    return view(module, tensors)


def view(
    module: nn.Module,
    effective: Mapping[str, Tensor | None],
    attributes: Mapping[str, Any] | None = None,
    cls: type[nn.Module] | None = None,
) -> nn.Module:
    """Returns an object that shares the module's `__dict__`, except for the tensors in `effective` and the attributes
    in `attributes`. Its class is `cls`, or the module's plain class. Paths of tensors may contain names of
    submodules."""
    own = {path: tensor for path, tensor in effective.items() if "." not in path}
    parametrized = module._modules.get("parametrizations")
    for name in parametrized._modules if parametrized is not None else ():  # the plain class does not compute them
        own.setdefault(name, getattr(module, name))
    stand_in: nn.Module = object.__new__(cls or plain_class(module))
    fields = {
        key: {} if effective and key not in TORCHS and _is_cache(value) else value
        for key, value in module.__dict__.items()
        if key not in own and key != SLOT
    }
    fields["_parameters"] = {**module._parameters, **own}
    nested: dict[str, dict[str, Tensor | None]] = {}
    for path, tensor in effective.items():
        child, dot, rest = path.partition(".")
        if dot:
            nested.setdefault(child, {})[rest] = tensor
    if nested:
        children = {child: view(module.get_submodule(child), tensors) for child, tensors in nested.items()}
        fields["_modules"] = {**module._modules, **children}
    stand_in.__dict__.update(fields, **(attributes or {}))
    return stand_in


def _is_cache(value: Any) -> bool:
    """Whether a value is a dictionary that contains only tensors, or is empty. Some modules store tensors there that
    they derive from parameters (LeViT's gathered biases), so a view gets an empty dictionary instead."""
    return type(value) is dict and all(isinstance(each, Tensor) for each in value.values())
