"""Adapter modules, which contain the operators. The operators that act on a module are stored below the module's
parent: those on ``self_attn.q_proj`` are ``self_attn.peft.q_proj.<injection>``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from torch import nn

ADAPTER_MODULES = "peft"
"""The attribute name of the adapter modules in their parent module."""
IDLE = "_peftcore_idle"
"""The key in an operator's ``__dict__`` under which a mark is stored while the operator's values are offloaded."""
BASE_ALONE: ContextVar[bool] = ContextVar("base_alone", default=False)
"""Whether state dicts contain only the base, without operators."""


class AdapterModules(nn.Module):
    """Contains the operators that act on the children of one module: ``self_attn.peft.q_proj.<injection>``."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load a state dict. If it has no entries for these operators, because it contains only the base, they keep
        their values."""
        if not any(key.startswith(prefix) for key in state_dict):
            self._put_own(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _put_own(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Add the state of the operators to a state dict, except for idle operators, whose values are offloaded."""
        for name, child in self._modules.items():
            if isinstance(child, AdapterModules):
                child._put_own(state_dict, f"{prefix}{name}.")
            elif child is not None and IDLE not in vars(child) and not BASE_ALONE.get():
                child.state_dict(destination=state_dict, prefix=f"{prefix}{name}.")

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Returns torch's state dict; it is empty while only the base is saved."""
        return kwargs.get("destination", {}) if BASE_ALONE.get() else super().state_dict(*args, **kwargs)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Yields torch's named modules. While only the base is saved, yields none, because functions that save may
        count the parameters of all modules."""
        return iter(()) if BASE_ALONE.get() else super().named_modules(*args, **kwargs)


def base_modules(*models: nn.Module) -> set[nn.Module]:
    """Returns all modules of the models except adapter modules, which may be many. Other threads may add modules
    meanwhile."""
    found: set[nn.Module] = set()
    left: list[nn.Module | None] = [*models]
    while left:
        module = left.pop()
        if module is not None and module not in found and not isinstance(module, AdapterModules):
            found.add(module)
            left += module._modules.values()
    return found


def has_submodules(module: nn.Module) -> bool:
    """Whether a module has submodules of the base model. The adapter modules of an ``nn.Sequential`` are inside of the
    target modules, since it runs all of its own children."""
    return any(not isinstance(each, AdapterModules) for each in module._modules.values())


def note_lacking(model: nn.Module, state_dict: Mapping[str, Any], prefix: str, metadata: Any, strict: bool,
                 missing: list[str], unexpected: Any, errors: Any) -> None:  # fmt: skip
    """Hook that runs when an adapted model has loaded a state dict. If the state dict contains adapters, all other
    adapters of the model are reported as missing. If it contains only the base, all operators keep their values.

    The hook is registered on the model, since torch passes to each module only the entries below it.
    """
    inside = {f"{prefix}{path}.": each for path, each in model.named_modules() if isinstance(each, AdapterModules)}
    ours = [key for key in state_dict if f".{ADAPTER_MODULES}." in f".{key}"]
    begun = {key[: end + 1] for key in ours for end, sign in enumerate(key) if sign == "."}
    if begun.isdisjoint(inside):
        return
    for path, module in inside.items():
        for name, child in module._modules.items():
            if f"{path}{name}." in begun and child is not None and (idle := vars(child).get(IDLE)) is not None:
                raise idle.error("a state dict cannot be loaded into it")
    known = set(missing)  # a model around this one may have noted them
    for path, module in inside.items():
        if path not in begun and not any(isinstance(child, AdapterModules) for child in module.children()):
            missing += [path + key for key in module.state_dict() if path + key not in known]
