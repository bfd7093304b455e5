"""Loads plugins, one entry point at a time. A broken plugin is reported, and the others still work."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pluggy

from peftcore.contract import hookspecs
from peftcore.contract.hookspecs import API
from peftcore.contract.presets import Preset
from peftcore.errors import PluginError

if TYPE_CHECKING:
    from torch import nn

    from peftcore.layers.layer import Layer

GROUP = "peftcore"
"""The entry point group of plugins."""
RUNTIME = "registered"
"""The plugin name of methods that are added with `register`."""
CORE = "peftcore.core_plugin"
"""The module with the core's own hook implementations. It is loaded like a plugin."""
RESERVED = {RUNTIME, CORE}
DISABLE = "PEFTCORE_DISABLE"
"""An environment variable: the names of plugins that are not loaded, separated by commas."""


@dataclass(frozen=True)
class Plugin:
    """One loaded plugin."""

    name: str
    """The name of the plugin's entry point."""
    distribution: str
    """The distribution that contains the plugin, with its version."""
    methods: Mapping[str, str]
    """The methods of the plugin: ``"module:Class"`` by name."""
    presets: Mapping[str, Preset] = field(default_factory=dict)
    """Presets by name."""


@dataclass(frozen=True)
class Failure:
    """A plugin that could not be loaded, and the reason."""

    name: str
    distribution: str
    reason: str

    def __str__(self) -> str:
        return f"peftcore plugin {self.name!r} ({self.distribution}) was not loaded: {self.reason}"


class PluginWarning(UserWarning):
    """Warns that a plugin could not be loaded. All other plugins still work."""


@dataclass
class Registry:
    """The hook manager, the loaded plugins and the failures."""

    manager: pluggy.PluginManager
    plugins: dict[str, Plugin] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    @property
    def hook(self) -> Any:
        """The hooks of pluggy. A call of a hook calls its implementations in all plugins:
        ``registry().hook.peftcore_map(model=model)``."""
        return self.manager.hook

    def load(self, name: str, distribution: str, module: Any) -> None:
        """Register the module of one plugin. If that fails, the plugin is removed completely, and the failure is
        recorded."""
        try:
            version = getattr(module, "PEFTCORE_API", None)
            if version != API:
                raise pluggy.PluginValidationError(
                    module,
                    f"it was written for API {version}, and this peftcore has API {API}: install another version",
                )
            self.manager.register(module, name)
            self.manager.check_pending()
            self.plugins[name] = Plugin(
                name, distribution, _methods_of(self.manager, module), _presets_of(self.manager, module)
            )
        except Exception as error:  # any error of a plugin is that plugin's alone
            if self.manager.get_plugin(name) is module:
                self.manager.unregister(name=name)
            self.fail(name, distribution, error)

    def fail(self, name: str, distribution: str, error: BaseException) -> None:
        """Record that a plugin could not be loaded, and give a `PluginWarning`."""
        failure = Failure(name, distribution, f"{type(error).__name__}: {error}")
        self.failures.append(failure)
        warnings.warn(str(failure), PluginWarning, stacklevel=2)


def _answers(manager: pluggy.PluginManager, module: Any, hook: str) -> dict[str, Any]:
    """Returns the result of one plugin for one hook, a hook that maps names to objects."""
    found: dict[str, Any] = {}
    for caller in manager.get_hookcallers(module) or []:
        for implementation in caller.get_hookimpls() if caller.name == hook else ():
            if implementation.plugin is module:
                answer: Any = implementation.function()
                found.update(answer)
    return found


def _presets_of(manager: pluggy.PluginManager, module: Any) -> Mapping[str, Preset]:
    presets = _answers(manager, module, "peftcore_presets")
    if wrong := [name for name, preset in presets.items() if not isinstance(preset, Preset)]:
        raise pluggy.PluginValidationError(module, f"peftcore_presets must map names to Preset; wrong: {wrong}")
    return presets


def _methods_of(manager: pluggy.PluginManager, module: Any) -> Mapping[str, str]:
    methods: dict[str, str] = _answers(manager, module, "peftcore_methods")
    wrong = [
        pair for pair in methods.items() if not (all(isinstance(e, str) for e in pair) and pair[1].count(":") == 1)
    ]
    if wrong:
        raise pluggy.PluginValidationError(module, f"peftcore_methods must map names to 'module:Class'; wrong: {wrong}")
    return methods


def _entry_points() -> Iterator[importlib.metadata.EntryPoint]:
    yield from sorted(importlib.metadata.entry_points(group=GROUP), key=lambda point: (point.name, point.value))


def _distribution(point: importlib.metadata.EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "unknown distribution"


@functools.cache
def registry() -> Registry:
    """Returns the registry of plugins. The first call loads all plugins."""
    manager = pluggy.PluginManager("peftcore")
    manager.add_hookspecs(hookspecs)
    manager.register(importlib.import_module(CORE), CORE)
    found = Registry(manager)
    disabled = {name.strip() for name in os.environ.get(DISABLE, "").split(",")}
    for point in _entry_points():
        if point.name in disabled:
            continue
        if point.name in found.plugins or point.name in RESERVED:
            owner = found.plugins[point.name].distribution if point.name in found.plugins else "peftcore itself"
            error = ValueError(f"its name is taken by {owner}")
            found.fail(point.name, _distribution(point), error)
            continue
        try:
            module = point.load()
        except Exception as error:  # any error of an import
            found.fail(point.name, _distribution(point), error)
            continue
        found.load(point.name, _distribution(point), module)
    return found


def named_places(hook: str, what: str) -> dict[str, str]:
    """Calls a hook that maps names to ``"module:Class"``, and returns the results of all plugins in one dictionary. The
    core's names are first.

    `what` is the word for such a name in error messages.

    Raises:
        PluginError: two plugins return the same name.
    """
    found: dict[str, str] = {}
    for named in reversed(getattr(registry().hook, hook)()):
        for name, place in named.items():
            if found.setdefault(name, place) != place:
                raise PluginError(f"{what} {name!r} is in {found[name]} and in {place}; disable one of the plugins")
    return found


def imported(place: str) -> Any:
    """Imports and returns the object at ``"module:Class"``."""
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


def layer_of(module: nn.Module, tensor: str) -> Layer:
    """Returns the `Layer` of a module's tensor, from the first plugin that returns one."""
    layer: Layer = registry().hook.peftcore_layer(module=module, tensor=tensor)
    return layer
