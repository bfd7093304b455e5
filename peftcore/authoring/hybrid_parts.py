"""Shared code of hybrids, which are methods that combine other methods (parts)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from peftcore.contract.config import MethodConfig, validate_json
from peftcore.contract.installed_methods import AppliedMethod
from peftcore.errors import ConfigError
from peftcore.forward.context.context import ForwardContext
from peftcore.registry.catalogue import method as find_method
from peftcore.registry.plugins import registry
from peftcore.registry.preset_methods import method_of, preset_of


def options_of(part: Mapping[str, Any]) -> MethodConfig:
    """Returns the validated options of one part. A part is a mapping with the name of a method as "method", options of
    that method, and optionally a "target".

    Raises:
        ConfigError: the part does not name a method, or its options break a rule of that method.
    """
    if not isinstance(part.get("method"), str):
        raise ConfigError('a part has no "method": name its method, as in {"method": "lora", ...}')
    kind = find_method(part["method"]).Config
    options = {key: value for key, value in part.items() if key != "target"}
    return validate_json(kind, json.dumps({**options, "method": kind.model_fields["method"].default}))


def without_preset(part: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the part. If its "method" is the name of a preset, this is replaced by the preset's method, options and
    target.

    Raises:
        ConfigError: as in `options_of`; or the preset trains additional modules, which a part of a hybrid cannot do.
    """
    config = options_of(part)
    cls = find_method(part["method"])
    preset = preset_of(cls)
    if preset is None:
        return dict(part)
    if preset.train:
        raise ConfigError(
            f"the preset {cls.name} also trains {', '.join(preset.train)}, which a part of a hybrid cannot: use "
            f"{preset.method}"
        )
    _, own = method_of(cls, config.model_dump(exclude={"method"}))
    target = {"target": part.get("target", preset.target)}
    return {**own.model_dump(mode="json"), **(target if target["target"] is not None else {})}


def _sum(losses: Iterable[Tensor | None]) -> Tensor | None:
    given = [loss for loss in losses if loss is not None]
    return sum(given[1:], given[0]) if given else None


class OfParts:
    """Mixin for hybrids (methods made of other methods). Its functions call the same function of each part. List it
    before `Method` among the base classes."""

    def trainable(self, model: nn.Module, config: Any, injection: AppliedMethod) -> None:
        """Turn on `requires_grad` of the parameters that the parts select."""
        for part in injection.parts.values():
            registry().hook.peftcore_select(model=model, method=part.method, config=part.config, injection=part)

    def aux_loss(self, injection: AppliedMethod) -> Tensor | None:
        """Returns the sum of the parts' losses."""
        return _sum(part.method.aux_loss(part) for part in injection.parts.values())

    def output_loss(self, injection: AppliedMethod, output: Any, call: ForwardContext) -> Tensor | None:
        """Returns the sum of the parts' losses."""
        return _sum(part.method.output_loss(part, output, call) for part in injection.parts.values())

    def parameter_groups(self, injection: AppliedMethod, *, lr: float, **defaults: Any) -> list[dict[str, Any]]:
        """Returns the parameter groups of all parts in one list."""
        parts = injection.parts.values()
        return [group for part in parts for group in part.method.parameter_groups(part, lr=lr, **defaults)]
