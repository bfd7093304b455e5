"""Union of methods: any list of them as one adapter.   ConfigUnion of the Adapters library, arXiv 2311.11077.

    union(m_1, ..., m_n): every m_i acts at its own sites, as if applied by itself

Where several parts act on the same module they compose in the order of the list, as several injections would. The
union is one injection: it is switched, routed, merged, saved and loaded as a whole. It merges if all its parts do, and
starts as an identity if all its parts do.

Parameters: the sum over its parts.

Use it to try combinations (LoRA with a prefix, adapters with trained norms) without writing a method.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator
from torch import Tensor, nn

import peftcore
from peftcore import Injection, Method, MethodConfig, Site, Surgeon, Tags
from peftcore.config import validate_json
from peftcore.errors import ConfigError
from peftcore.plugins import registry


class Config(MethodConfig):
    """Options of a union."""

    method: Literal["config_union"] = "config_union"
    parts: list[dict[str, Any]] = Field(min_length=1)
    """The methods in order: each as its options, with its name under "method" and its "target" if it has its own."""

    @field_validator("parts")
    @classmethod
    def _known(cls, parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for part in parts:
            options_of(part)
        return parts


def options_of(part: Mapping[str, Any]) -> MethodConfig:
    """The checked options of one part.

    Raises:
        ConfigError: it names no method, or its options break a rule of that method.
    """
    if "method" not in part:
        raise ConfigError('every part of a union says which it is: {"method": "lora", ...}')
    options = {key: value for key, value in part.items() if key != "target"}
    kind = peftcore.method(part["method"]).Config
    return validate_json(kind, json.dumps({**options, "method": kind.model_fields["method"].default}))


class ConfigUnion(Method):
    """Several methods under one name."""

    name = "config_union"
    Config = Config
    tags = Tags(category="hybrid", paper="2311.11077", checked_against="its parts, one by one")
    target = ()

    def inject(self, model: nn.Module, config: Config, surgeon: Surgeon) -> None:
        for index, part in enumerate(config.parts):
            surgeon.include(str(index), peftcore.method(part["method"])(), options_of(part), part.get("target"))

    def trainable(self, model: nn.Module, config: Config, injection: Injection) -> None:
        for part in injection.parts.values():
            registry().hook.peftcore_select(model=model, method=part.method, config=part.config, injection=part)

    def aux_loss(self, injection: Injection) -> Tensor | None:
        losses = [part.method.aux_loss(part) for part in injection.parts.values()]
        given = [loss for loss in losses if loss is not None]
        return sum(given[1:], given[0]) if given else None

    def parameter_groups(self, injection: Injection, *, lr: float, **defaults: Any) -> list[dict[str, Any]]:
        parts = injection.parts.values()
        return [group for part in parts for group in part.method.parameter_groups(part, lr=lr, **defaults)]

    @staticmethod
    def parameter_count(site: Site, config: Config) -> int:
        raise ConfigError("a union has no formula of its own: ask each of its parts")
