"""The arguments of `apply` and `plan`: the method and its options, the model, where to act, which seed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from peftcore.contract.config import MethodConfig, dtype_of
from peftcore.contract.method import Method
from peftcore.contract.peft_names import is_peft_config
from peftcore.errors import ConfigError, UnsupportedHost
from peftcore.registry.catalogue import method as find_method
from peftcore.registry.plugins import registry
from peftcore.registry.presets import method_of, preset_of
from peftcore.roles import HostMap
from peftcore.surgery.surgeon import Wishes
from peftcore.targets.resolver import Target, names_a_role

Part = str | MethodConfig | Mapping[str, Any]
"""One method of a hybrid: a name, a config object, or the options as a mapping with the name under "method" (and, where
the part has its own, a "target")."""


def check_model(model: object) -> None:
    """Check that what is to be adapted is a module.

    Raises:
        UnsupportedHost: it is something else, such as a pipeline; the modules that it has are named.
    """
    if not isinstance(model, nn.Module):
        held = vars(model) if isinstance(getattr(model, "__dict__", None), dict) else {}
        inside = [f".{name}" for name, value in held.items() if isinstance(value, nn.Module)]
        hint = f"; it has {', '.join(inside)}: adapt one of these" if inside else ""
        raise UnsupportedHost(f"{type(model).__name__} is no nn.Module{hint}")


def host_map(model: nn.Module) -> HostMap:
    """Returns the host's map, from the first plugin that knows the host."""
    found: HostMap = registry().hook.peftcore_map(model=model)
    return found


def resolve_method(
    method: str | MethodConfig | type[Method] | Sequence[Part], options: Mapping[str, Any]
) -> tuple[Method, MethodConfig]:
    """Returns the method and its checked options, from a name, a config object, a method class, or a list of parts."""
    if isinstance(method, Sequence) and not isinstance(method, str):
        return resolve_method("config_union", {"parts": [_spelled(part) for part in method], **options})
    if isinstance(method, MethodConfig):
        return find_method(method.method)(), method.replace(**options) if options else method
    if is_peft_config(method):
        raise ConfigError(
            f"a {type(method).__name__} of peft can be applied, and nothing else: peftcore.apply(model, it)"
        )
    cls = find_method(method) if isinstance(method, str) else method
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise ConfigError(
            f'{type(method).__name__} is no method: name one, peftcore.apply(model, "lora", rank=8), or give a config, '
            "or a list of methods. Files of peft are read by peftcore.load(model, folder)"
        )
    return method_of(cls, options)


def _spelled(part: Part) -> dict[str, Any]:
    if isinstance(part, MethodConfig):
        return part.model_dump(mode="json")
    return {"method": part} if isinstance(part, str) else dict(part)


def with_preset(
    method: object, model: nn.Module, target: Target | None, train: Iterable[str], host: HostMap | None
) -> tuple[Target | None, tuple[str, ...], HostMap | None, str | None]:
    """Returns `target`, `train` and `host` as `apply` has them, with those of the preset that a name may be, and the
    preset's name. Roles of a preset that the host lacks are passed over, as of default targets."""
    cls = find_method(method) if isinstance(method, str) else None
    preset = None if cls is None else preset_of(cls)
    train = (train,) if isinstance(train, str) else tuple(train)
    if cls is None or preset is None:
        return target, train, host, None
    if target is None and preset.target is not None:
        host = host or host_map(model)
        targets = [preset.target] if isinstance(preset.target, str) else [*preset.target]
        target = [each for each in targets if host.knows(each) or not names_a_role(each)] or targets
    return target, (*preset.train, *train), host, cls.name


def wishes_of(
    target: Target | None,
    exclude: Target | None,
    train: Iterable[str],
    seed: int | None,
    dtype: torch.dtype | str | None,
) -> Wishes:
    """Returns the user's wishes; the seed is torch's own unless one is given, so that torch.manual_seed decides."""
    train = (train,) if isinstance(train, str) else tuple(train)
    return Wishes(target, exclude, train, torch.initial_seed() if seed is None else seed, dtype_of(dtype))
