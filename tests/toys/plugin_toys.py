"""Plugins made up in a test, as installed distributions show them to the core."""

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

from core_toys import DoublingConfig

import peftcore
import peftcore.registry.plugins
from peftcore.author import Method, MethodConfig, Tags, hookimpl

GOOD = {"toy_doubling": "core_toys:Doubling"}


@dataclass
class Point:
    """What an entry point of an installed distribution looks like to the core."""

    name: str
    load: Callable[[], Any]
    dist: Any = field(default_factory=lambda: SimpleNamespace(name="good-dist", version="1.0"))
    value: str = "module"


def plugin(methods: Any = GOOD, api: Any = peftcore.author.API, **hooks: Any) -> types.ModuleType:
    """A plugin module that brings `methods`."""
    module = types.ModuleType("toy_plugin")
    if api is not None:
        module.PEFTCORE_API = api
    module.peftcore_methods = hookimpl(lambda: methods)
    for name, function in hooks.items():
        setattr(module, name, function)
    return module


def point(name: str, module: Any, distribution: str = "good-dist", version: str = "1.0") -> Point:
    return Point(name, lambda: module, SimpleNamespace(name=distribution, version=version))


def names() -> list[str]:
    return [info.name for info in peftcore.methods()]


class AliasedConfig(MethodConfig):
    """No options."""

    method: Literal["toy_long_name"] = "toy_long_name"


class Aliased(Method):
    name = "toy_long_name"
    aliases = ("toy_short",)
    Config = AliasedConfig
    tags = Tags(category="additive", paper="none")
    target = "first"

    def inject(self, model: Any, config: Any, surgeon: Any) -> None:
        for site in surgeon.sites():
            surgeon.replace(site)

    @staticmethod
    def parameter_count(site: Any, config: Any) -> int:
        return 0


def method_members() -> dict[str, Any]:
    return {
        "name": "toy_made",
        "Config": DoublingConfig,
        "tags": Tags(category="additive", paper="none"),
        "target": "attn.q",
        "inject": lambda self, model, config, surgeon: None,
        "parameter_count": staticmethod(lambda site, config: 0),
    }
