"""Folding what computes a tensor (weight norm, spectral norm, pruning, any parametrization of torch) away, so that the
module holds a plain parameter in its place, and the exact way back."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.forward.class_swap import change_class, grafted_class
from peftcore.forward.slot import slot_of
from peftcore.layers.computed import computation, parametrized, resting, sources_of
from peftcore.layers.layer import plain_class

HOOKS = ("_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")
TABLES = ("_parameters", "_buffers", "_modules", *HOOKS)
"""The attributes of a module in which torch keeps what computes a tensor."""
CLOSE = 4
"""How many roundings a parametrization may be off from a value that was put through its inverse."""


@dataclass(frozen=True, eq=False)
class Unfolded:
    """A module as it was before `fold`."""

    module: nn.Module
    cls: type[nn.Module]
    tables: Mapping[str, tuple[dict[Any, Any], frozenset[Any]]]
    """The content of `TABLES` before `fold`, and their keys after it: others may add and remove things meanwhile."""
    left: Mapping[str, Any]
    """Plain attributes: what a hook left there in the last forward."""
    tensors: Mapping[str, Tensor]
    """The tensors that it holds since, by name: the one that was asked for, and others that were computed with it."""


def fold(module: nn.Module, name: str, value: nn.Parameter) -> Unfolded:
    """Let a module hold `value` as its tensor `name`, and take out what computes that tensor.

    Where parametrizations compute other tensors of the module too, these are folded with it, at their values.
    """
    way = computation(module, name)
    assert way is not None, "only a tensor that is computed is folded"
    before, cls = {key: dict(vars(module)[key]) for key in TABLES}, type(module)
    tensors: dict[str, Tensor] = {name: value}
    left = {}
    if way.hook is None:
        tensors |= {each: _as_held(module, each) for each in parametrized(module) if each != name}
        plain = plain_class(module)
        del module._modules["parametrizations"]
        change_class(module, plain if slot_of(module) is None else grafted_class(plain))
    else:
        for table in HOOKS:
            _drop(vars(module)[table], [key for key, hook in before[table].items() if _belongs(hook, way.hook)])
        for table in ("_parameters", "_buffers"):
            _drop(vars(module)[table], sources_of(name))
        left = {name: vars(module).pop(name)} if name in vars(module) else {}
    for table, kind in (("_parameters", True), ("_buffers", False)):
        held = {each: tensor for each, tensor in tensors.items() if isinstance(tensor, nn.Parameter) is kind}
        _fill(vars(module)[table], {**held, **vars(module)[table]})
    return Unfolded(module, cls, {key: (before[key], frozenset(vars(module)[key])) for key in TABLES}, left, tensors)


def unfold(before: Unfolded) -> None:
    """Undo `fold`. What others added to the module or took from it meanwhile stays so."""
    module = before.module
    for key, (old, after) in before.tables.items():
        now = vars(module)[key]
        back = {each: now.get(each, value) for each, value in old.items() if each in now or each not in after}
        _fill(now, back | {each: value for each, value in now.items() if each not in old and each not in after})
    vars(module).update(before.left)
    change_class(module, before.cls)


def inverted(way: nn.Module, value: Tensor) -> dict[str, Tensor] | None:
    """Returns the tensors from which a parametrization computes `value`, up to roundings, by their names in it; None
    where it gives another. A weight norm can give any value: what was built with one keeps it, and so the names of its
    state dict."""
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


def _drop(table: dict[Any, Any], keys: Iterable[Any]) -> None:
    for key in keys:
        table.pop(key, None)


def _fill(table: dict[Any, Any], entries: dict[Any, Any]) -> None:
    """Give a table these entries; it stays the object that handles of hooks hold."""
    table.clear()
    table.update(entries)
