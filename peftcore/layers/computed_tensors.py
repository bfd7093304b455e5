"""Tensors that a module computes from others before it uses them: by torch's parametrizations, or by torch's older
forward pre-hooks (weight_norm, spectral_norm, pruning)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from peftcore.utils.journal import Journal


@dataclass(frozen=True, eq=False)
class Computation:
    """The way in which a module's tensor is computed."""

    value: Callable[[], Tensor]
    """Returns the tensor as the next forward in evaluation mode will compute it. The module does not change."""
    sources: tuple[nn.Parameter, ...]
    """The parameters from which it is computed."""
    hook: Any = None
    """The forward pre-hook that computes it; None for a parametrization."""


def computation(module: nn.Module, name: str) -> Computation | None:
    """Returns how a module computes its tensor `name`. None if the module stores the tensor, or computes it without
    torch's parametrizations and hooks."""
    if name in module._parameters:  # as nearly always
        return None
    if parametrize.is_parametrized(module, name):
        way: Any = parametrized(module)[name]
        return Computation(partial(_resting, way), tuple(way.parameters(recurse=False)))
    return by_hook(module, name)


def by_hook(module: nn.Module, name: str) -> Computation | None:
    """Returns how one of torch's forward pre-hooks computes a tensor; None if no hook does. The value that the hook
    stored on the module in the last forward may be out of date."""
    for hook in module._forward_pre_hooks.values():
        value = _value(hook, module, name)
        if value is not None:
            held = module._parameters
            return Computation(
                value, tuple(each for key in sources_of(name) if (each := held.get(key)) is not None), hook
            )
    return None


def _value(hook: Any, module: nn.Module, name: str) -> Callable[[], Tensor] | None:
    if isinstance(hook, WeightNorm):
        return partial(hook.compute_weight, module) if hook.name == name else None
    if isinstance(hook, SpectralNorm):
        return partial(hook.compute_weight, module, do_power_iteration=False) if hook.name == name else None
    if isinstance(hook, BasePruningMethod):
        return partial(hook.apply_mask, module) if hook._tensor_name == name else None
    return None


def has_place(module: nn.Module, name: str) -> bool:
    """Whether a new value for a tensor can be stored: the module stores the tensor, has an empty slot for it (None), or
    computes it by torch's hooks or parametrizations. A plain attribute does not count if the module has forward
    pre-hooks, since an unknown hook may set it before each forward."""
    if name in module._parameters or name in module._buffers or computation(module, name) is not None:
        return True
    return name in vars(module) and not module._forward_pre_hooks


def sources_of(name: str) -> tuple[str, ...]:
    """Returns the names under which torch's hooks store the tensors from which they compute a tensor."""
    return tuple(f"{name}_{each}" for each in ("g", "v", "u", "orig", "mask"))


def parametrized(module: nn.Module) -> dict[str, nn.Module]:
    """Returns a module's parametrizations by the names of the tensors."""
    found = module._modules.get("parametrizations")
    return {} if found is None else dict(found.named_children())


def _resting(way: nn.Module) -> Tensor:
    with resting([way]):
        value: Tensor = way()
        return value


@contextmanager
def resting(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Context manager in which these modules and all modules inside them are in evaluation mode. In training mode, a
    spectral norm takes a power iteration step whenever its value is computed."""
    with Journal(temporary=True) as journal:
        for each in [each for module in modules for each in module.modules() if each.training]:
            journal.set(each, "training", False)
        yield
