"""Adapter modules, in which operators live: one level above the module that they act on,
``self_attn.peft.q_proj.<injection>``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from peftcore.forward.save_pretrained import BASE_ALONE

ADAPTER_MODULES = "peft"
"""The name of the adapter modules in the module above."""


class AdapterModules(nn.Module):
    """Holds the operators of the modules of one parent: ``self_attn.peft.q_proj.<injection>``."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load a state dict, which may be that of the bare base: operators that it does not name keep their values."""
        if not any(key.startswith(prefix) for key in state_dict):
            state_dict.update({prefix + key: value for key, value in self.state_dict().items()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Returns torch's state dict; nothing while the base is saved alone."""
        return kwargs.get("destination", {}) if BASE_ALONE.get() else super().state_dict(*args, **kwargs)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Yields torch's named modules; nothing while the base is saved alone: a saving function may count the
        parameters."""
        return iter(()) if BASE_ALONE.get() else super().named_modules(*args, **kwargs)


def note_lacking(model: nn.Module, state_dict: Mapping[str, Any], prefix: str, metadata: Any, strict: bool,
                 missing: list[str], unexpected: Any, errors: Any) -> None:  # fmt: skip
    """Hook of an adapted model for loading a state dict: where it holds adapters, those of which it holds nothing are
    missing. One of the bare base holds none, and operators keep their values.

    It is a hook of the model, since torch hands to a module only what is below it.
    """
    inside = {f"{prefix}{path}.": each for path, each in model.named_modules() if isinstance(each, AdapterModules)}
    ours = [key for key in state_dict if f".{ADAPTER_MODULES}." in f".{key}"]
    begun = {key[: end + 1] for key in ours for end, sign in enumerate(key) if sign == "."}
    if begun.isdisjoint(inside):
        return
    known = set(missing)  # a model around this one may have noted them
    for path, module in inside.items():
        if path not in begun and not any(isinstance(child, AdapterModules) for child in module.children()):
            missing += [path + key for key in module.state_dict() if path + key not in known]
