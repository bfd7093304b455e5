"""Folds computed tensors: replaces the parametrization of a tensor (weight norm, spectral norm, pruning, any
parametrization of torch) by a plain parameter, and restores it exactly."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.forward.class_swap import become
from peftcore.layers.computed_tensors import computation, parametrized, resting, sources_of
from peftcore.layers.layer import plain_class
from peftcore.utils.journal import Journal

HOOKS = ("_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")
"""The hook tables of a module in which torch registers the computation of a tensor."""
CLOSE = 4
"""The largest relative error, in multiples of the dtype's epsilon, of a value after the inverse of a parametrization
and then the parametrization itself."""


def fold(journal: Journal, module: nn.Module, name: str, value: nn.Parameter) -> dict[str, Tensor]:
    """Store `value` in a module as the plain parameter `name`, and remove the computation of that tensor. Returns the
    new tensors of the module by name. If parametrizations also compute other tensors of the module, these are folded
    too and keep their values.
    """
    way = computation(module, name)
    assert way is not None, "only a tensor that is computed is folded"
    tensors: dict[str, Tensor] = {name: value}
    if way.hook is None:
        tensors |= {each: _as_held(module, each) for each in parametrized(module) if each != name}
        plain = plain_class(module)
        journal.drop(module, "_modules", "parametrizations")
        become(journal, module, plain)
    else:
        for table in HOOKS:
            for key in [key for key, hook in vars(module)[table].items() if _belongs(hook, way.hook)]:
                journal.drop(module, table, key)
        for table in ("_parameters", "_buffers"):
            for key in sources_of(name):
                journal.drop(module, table, key)
        journal.drop(module, "", name)  # what a hook left there in the last forward
    for each, tensor in reversed(tensors.items()):
        table = "_parameters" if isinstance(tensor, nn.Parameter) else "_buffers"
        journal.put(module, table, each, tensor, order=(each,))
    return tensors


def inverted(way: nn.Module, value: Tensor) -> dict[str, Tensor] | None:
    """Returns the tensors from which a parametrization computes `value` up to rounding, by their names in the
    parametrization. Returns None if the parametrization cannot produce `value`. A weight norm can produce any value, so
    a merge keeps it, and the names in the state dict stay.
    """
    found: Any = value
    try:
        for step in reversed(list(copy.deepcopy(way).children())):  # an inverse may change the step
            found = step.right_inverse(found)  # type: ignore[operator]
    except (AttributeError, NotImplementedError, ValueError, RuntimeError):
        return None  # it has none, or none for this value
    single = isinstance(found, Tensor)
    tensors = {"original": found} if single else {f"original{n}": each for n, each in enumerate(found)}
    if tensors.keys() != way._parameters.keys():
        return None
    first, *others = way.children()
    with resting([way]):
        again = first(*tensors.values())
        for step in others:
            again = step(again)
    return tensors if torch.allclose(again, value, rtol=CLOSE * torch.finfo(value.dtype).eps, atol=0.0) else None


def _as_held(module: nn.Module, name: str) -> Tensor:
    """Returns the present value of a computed tensor: as a parameter if it is computed from parameters, otherwise as a
    plain tensor."""
    way = computation(module, name)
    assert way is not None
    value = way.value().detach().clone()
    if way.sources:
        return nn.Parameter(value, any(source.requires_grad for source in way.sources))
    return value


def _belongs(hook: Any, to: Any) -> bool:
    """Whether a hook is the one that computes a tensor, or one that torch registered along with it."""
    hook = getattr(hook, "hook", hook)  # torch wraps those of loading
    return hook is to or getattr(hook, "fn", None) is to
