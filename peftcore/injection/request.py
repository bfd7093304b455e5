"""The `Request`: one adapter to install in a model, as requested by `apply`, `load` or `combine`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from peftcore.contract.batches import Data
from peftcore.contract.config import MethodConfig, dtype_of
from peftcore.contract.method import Method
from peftcore.contract.surgeon_protocol import Wishes
from peftcore.errors import CalibrationError, ConfigError, DuplicateInjection, UnsupportedHost
from peftcore.forward.state.host_state import state_of
from peftcore.injection.injection import Injection
from peftcore.layers.pieces import at_hand
from peftcore.registry.catalogue import method as find_method
from peftcore.registry.peft_names import is_peft_config
from peftcore.registry.plugins import registry
from peftcore.registry.preset_methods import method_of, preset_of
from peftcore.roles import HostMap
from peftcore.surgery.parallel_models import check_looks_at_no_data
from peftcore.surgery.surgeon import RecordingSurgeon
from peftcore.targets.resolver import Target, names_a_role
from peftcore.training.calibration import find_structure

Part = str | MethodConfig | Mapping[str, Any]
"""One method of a hybrid: a name, a config object, or a mapping of options. The mapping has the method's name under
"method", and may have a "target" for this method alone."""
Asked = str | MethodConfig | type[Method] | Sequence[Part]
"""The forms in which a user can pass a method: a name, a config object, a class, or a list of parts."""


@dataclass(frozen=True)
class Request:
    """One adapter to install in a model; `peftcore.injection.applying.apply_request` carries it out."""

    model: nn.Module
    method: Method
    config: MethodConfig
    """The options of the method, checked."""
    wishes: Wishes = field(default_factory=Wishes)
    """Targets, modules of the model that train too, seed and dtype."""
    host: HostMap | None = None
    """The map of the model to use; None to use the map that plugins derive."""
    name: str = ""
    """The name of the injection."""
    data: Data | None = None
    """Batches for a method that looks at data before training."""
    fill: Callable[[Injection], object] | None = None
    """A function that fills the installed injection with values from a file or from other adapters; None keeps the
    initial values."""
    active: bool = True
    """Whether the injection is active after the installation."""
    instead: Collection[str] = ()
    """The names of the injections that the new one replaces in the stack of active injections."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        method: Asked,
        options: Mapping[str, Any],
        *,
        name: str | None = None,
        target: Target | None = None,
        exclude: Target | None = None,
        train: Iterable[str] = (),
        data: Data | None = None,
        seed: int | None = None,
        dtype: torch.dtype | str | None = None,
        host: HostMap | None = None,
    ) -> Request:
        """Returns the request for the arguments of `apply`. If `method` names a preset, its target and name are the
        defaults, and its `train` modules are added. The default seed is torch's initial seed, which torch.manual_seed
        sets.

        Raises:
            UnknownMethod, AmbiguousMethod, ConfigError: as `apply`.
        """
        found, config = resolve_method(method, options)
        kind = find_method(method) if isinstance(method, str) else None
        train = (train,) if isinstance(train, str) else tuple(train)
        if kind is None or (preset := preset_of(kind)) is None:
            name = found.name if name is None else name
        else:
            name, train = kind.name if name is None else name, (*preset.train, *train)
            if target is None and preset.target is not None:
                host = host or host_map(model)
                targets = [preset.target] if isinstance(preset.target, str) else [*preset.target]
                # Roles of a preset that the model lacks are passed over, as of default targets.
                target = [each for each in targets if host.knows(each) or not names_a_role(each)] or targets
        wishes = Wishes(target, exclude, train, torch.initial_seed() if seed is None else seed, dtype_of(dtype))
        return cls(model, found, config, wishes, host, name, data)

    @property
    def map(self) -> HostMap:
        """The map of the model: `host`, or if that is None, the map that plugins derive."""
        return self.host or host_map(self.model)

    def check_data(self, surgeon: RecordingSurgeon) -> None:
        """Check that data is given exactly when the recorded method, or a part of a hybrid, needs it.

        Raises:
            CalibrationError: the data is missing, or the method does not use data.
            UnsupportedHost: the method would look at layers that receive only pieces of tensors (tensor parallelism).
            ConfigError: a part of a hybrid would choose its options from the data.
        """
        if self.fill is not None:  # who has the values needs no data
            return
        curious = [each.method.name for each in surgeon.with_parts() if each.method.looks_at_data(each.config)]
        if curious and self.data is None:
            raise CalibrationError(f"{curious[0]} looks at data before training: pass it with apply(..., data=batches)")
        if self.data is not None and not curious:
            some = self.method.tags.data_options or {}
            values = {option: value if isinstance(value, tuple) else (value,) for option, value in some.items()}
            but = "".join(f"; it does with {option}={' or '.join(map(repr, each))}" for option, each in values.items())
            raise CalibrationError(f"{self.method.name} does not look at data before training{but}; remove data=")
        if self.data is not None:
            check_looks_at_no_data(surgeon)
            _check_parts(surgeon, self.data)


def check_model(model: object) -> None:
    """Check that the model to adapt is a module.

    Raises:
        UnsupportedHost: it is another object, such as a pipeline; the message names the modules in it.
    """
    if not isinstance(model, nn.Module):
        held = vars(model) if isinstance(getattr(model, "__dict__", None), dict) else {}
        inside = [f".{name}" for name, value in held.items() if isinstance(value, nn.Module)]
        hint = f"; it has {', '.join(inside)}: adapt one of these" if inside else ""
        raise UnsupportedHost(f"{type(model).__name__} is not an nn.Module{hint}")


def check_name(model: nn.Module, name: str) -> str:
    """Returns the name, if it is valid for a new injection of this host.

    Raises:
        DuplicateInjection: the name is taken, empty, contains a dot, or is an attribute of `nn.Module`.
    """
    state = state_of(model)
    if not name or "." in name or name in dir(nn.Module):
        raise DuplicateInjection(
            f"an injection cannot be named {name!r}: use a non-empty name without dots that is not an attribute of "
            "nn.Module"
        )
    if state is not None and name in state.injections:
        raise DuplicateInjection(
            f"this host already has an injection named {name!r}; pass another name=, or remove() it first"
        )
    return name


def host_map(model: nn.Module) -> HostMap:
    """Returns the map of the host (its roles), from the first plugin that recognizes the host."""
    with at_hand(model.parameters()):
        found: HostMap = registry().hook.peftcore_map(model=model)
    return found


def resolve_method(method: Asked, options: Mapping[str, Any]) -> tuple[Method, MethodConfig]:
    """Returns the method and its checked options, from a name, a config object, a method class, or a list of parts."""
    if isinstance(method, Sequence) and not isinstance(method, str):
        return resolve_method("config_union", {"parts": [_spelled(part) for part in method], **options})
    if isinstance(method, MethodConfig):
        return find_method(method.method)(), method.replace(**options) if options else method
    if is_peft_config(method):
        raise ConfigError(f"a peft {type(method).__name__} is supported only by apply: peftcore.apply(model, config)")
    cls = find_method(method) if isinstance(method, str) else method
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise ConfigError(
            f'{type(method).__name__} is not a method: pass a name, peftcore.apply(model, "lora", rank=8), a config, '
            "or a list of methods. Files of peft are read by peftcore.load(model, folder)"
        )
    return method_of(cls, options)


def _spelled(part: Part) -> dict[str, Any]:
    if isinstance(part, MethodConfig):
        return part.model_dump(mode="json")
    return {"method": part} if isinstance(part, str) else dict(part)


def _check_parts(surgeon: RecordingSurgeon, data: Data) -> None:
    """Check that no part of a hybrid chooses options or sites from the data: the options of a part are fixed.

    Raises:
        ConfigError: a part does. The message says which option to pass to the part instead.
    """
    _, *parts = surgeon.with_parts()
    for part in parts:
        if type(part.method).structure is Method.structure:
            continue
        sites = [graft.site for graft in part.grafts]
        options, left_out = find_structure(part.method, surgeon.model, data, part.config, sites)
        new = {path: own for path, own in options.overrides.items() if path not in part.config.overrides}
        if new or left_out:
            path, told = next(iter(new.items())) if new else (min(left_out), None)
            instead = f"exclude={path!r}" if told is None else f"overrides={{{path!r}: {told!r}}}"
            raise ConfigError(
                f"{part.method.name} decides from data how it adapts {len(new) + len(left_out)} single sites, which it "
                f"cannot do as a part: apply it alone, or pass the decisions to the part: {instead} and so on"
            )
