"""Folding what computes a tensor (weight norm, spectral norm, pruning, any parametrization of torch) away, so that the
module holds a plain parameter in its place, and the exact way back."""

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
"""The tables of a module in which torch keeps what computes a tensor, besides those of tensors and modules."""
CLOSE = 4
"""How many roundings a parametrization may be off from a value that was put through its inverse."""


def fold(journal: Journal, module: nn.Module, name: str, value: nn.Parameter) -> dict[str, Tensor]:
    """Let a module hold `value` as its tensor `name`, and take out what computes that tensor. Returns the tensors that
    it holds since, by name.

    Where parametrizations compute other tensors of the module too, these are folded with it, at their values.
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
    """Returns the tensors from which a parametrization computes `value`, up to rounding, by their names in it; None if
    it computes another value. A weight norm can represent any value, so a module that was built with one keeps it, and
    with it the names in its state dict.
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
    """Returns the present value of a computed tensor, as a module holds it: as a parameter, if it comes from any."""
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
