"""Union of methods: any list of them as one adapter.   ConfigUnion of the Adapters library, arXiv 2311.11077.

Equation:
    union(m_1, ..., m_n): every m_i acts at its own sites, as if applied by itself

If several parts act on the same module, they compose in the order of the list, as several injections do. The union is
one injection: it is activated, routed, merged, saved and loaded as a whole. It can be merged if all its parts can.

Parameters: the sum over its parts.

Start: Each part starts as by itself; the union is an identity if all parts are.

Differs from the authors' code: The Adapters library was not compared; unions are compared with adapters of peft.

Use it: `peftcore.apply(model, "config_union", parts=[{"method": "lora"}, {"method": "ia3"}])`, to try combinations
(LoRA with a prefix, adapters with trained norms) without writing a method.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator
from torch import nn

import peftcore
from peftcore.author import Method, MethodConfig, OfParts, Site, Surgeon, Tags, options_of, without_preset
from peftcore.errors import ConfigError


class ConfigUnionConfig(MethodConfig):
    """Options of a union."""

    method: Literal["config_union"] = "config_union"
    parts: list[dict[str, Any]] = Field(min_length=1, max_length=100)
    """The methods in order. Each is a dictionary with its options, its name under "method", and optionally its own
    targets under "target"."""

    @field_validator("parts")
    @classmethod
    def _known(cls, parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [without_preset(part) for part in parts]


class ConfigUnion(OfParts, Method):
    """Several methods that act as one adapter.

    Example:
        injection = peftcore.apply(model, "config_union", parts=[{"method": "lora", "rank": 4}, {"method": "ia3"}])
    """

    name = "config_union"
    Config = ConfigUnionConfig
    tags = Tags(category="hybrid", paper="2311.11077")
    target = ()

    def inject(self, model: nn.Module, config: ConfigUnionConfig, surgeon: Surgeon) -> None:
        for index, part in enumerate(config.parts):
            surgeon.include(str(index), peftcore.method(part["method"])(), options_of(part), part.get("target"))

    @staticmethod
    def parameter_count(site: Site, config: ConfigUnionConfig) -> int:
        raise ConfigError("a union of methods has no equation of its own; read the equations of its parts")
