"""The catalogue of methods by name, and the schema of their options.

A method's module is imported on the first request for the method.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

from peftcore.contract.method import CATEGORIES, Method, Tags, check_method_class
from peftcore.contract.presets import Preset
from peftcore.errors import AmbiguousMethod, PluginError, UnknownMethod
from peftcore.registry.evidence import parts, sources
from peftcore.registry.plugins import RUNTIME, Plugin, imported, registry
from peftcore.registry.preset_methods import class_of

M = TypeVar("M", bound=type[Method])
_registered: dict[str, type[Method]] = {}
_loaded: dict[str, type[Method]] = {}
TRAINS, COMBINES, QUANTIZED = "trains", "combines", "quantized"
"""The values of `MethodInfo.kind`, the purpose of a method."""
BUDGETS = "peftcore.authoring.budgets:budgets"
"""The function that counts parameters on reference models. It is in a higher layer, so it is imported by name on
use."""


@dataclass(frozen=True)
class MethodInfo:
    """One entry of `methods()`. Its attributes import at most the method's own module."""

    name: str
    """The name by which `apply` finds the method."""
    plugin: str
    """The plugin's name. If two plugins have a method of the same name, ``"plugin/name"`` identifies one."""
    distribution: str
    """The distribution that contains the method, with its version; or "registered at run time"."""
    location: str = field(repr=False)
    """The path of the method's class, ``module:Class``."""
    aliases: tuple[str, ...] = ()
    """Other names of the method."""
    preset: Preset | None = None
    """The preset (its method and options), if the entry is one; None for a method."""

    def _tags(self) -> Tags:
        return method(f"{self.plugin}/{self.name}").tags

    @property
    def tags(self) -> Tags:
        """The declared capabilities (imports the method's module)."""
        return self._tags()

    @property
    def category(self) -> str:
        """The survey's category (imports the method's module)."""
        return self._tags().category

    @property
    def paper(self) -> str:
        """Reference of the defining paper (imports the method's module)."""
        return self._tags().paper

    @property
    def mergeable(self) -> bool:
        """`Tags.mergeable` (imports the method's module)."""
        return self._tags().mergeable

    @property
    def per_row(self) -> bool:
        """`Tags.per_row` (imports the method's module)."""
        return self._tags().per_row

    @property
    def needs_data(self) -> bool:
        """`Tags.needs_data` (imports the method's module)."""
        return self._tags().needs_data

    @property
    def kind(self) -> str:
        """The purpose of the method: it "trains" new parameters, "combines" trained adapters as its parts, or is for
        "quantized" models (imports the method's module)."""
        if self.category == "quantized":
            return QUANTIZED
        parts = "parts" in method(f"{self.plugin}/{self.name}").Config.model_fields
        return COMBINES if self.category == "multitask" and parts else TRAINS

    @property
    def checked_against(self) -> str:
        """The sources of numbers that the plugin's tests compare with: libraries with their versions, and "the authors'
        code", separated by commas; empty if its tests compare only with the equation."""
        return sources(self.location, self.name if self.preset is None else self.preset.method)

    @property
    def compared(self) -> Mapping[str, tuple[str, ...]]:
        """The parts of the method that the plugin's tests compare with each source: "outputs", "start" (the initial
        values), "trains" (which tensors train) and "defaults" (of its options), by the words of `checked_against`."""
        return parts(self.location, self.name if self.preset is None else self.preset.method)

    @property
    def checked(self) -> bool:
        """Whether the tests compare the method with numbers of another source. Otherwise the method is *equation
        only*."""
        return bool(self.checked_against)

    @property
    def budgets(self) -> Mapping[str, int]:
        """The number of trainable values with default options, by name of the reference hosts in which the method finds
        a target.

        It plans the method on the meta device, on models of those of transformers and diffusers that are installed.
        This takes one or two seconds.
        """
        found: Mapping[str, int] = imported(BUDGETS)(f"{self.plugin}/{self.name}")
        return found


def register(cls: M) -> M:
    """Add a method at run time, without a package, for example in a notebook. Usable as a decorator. A method
    registered earlier under the same name is replaced.

    Raises:
        PluginError: the class breaks the contract.
    """
    check_method_class(cls)
    _registered[cls.name] = cls
    return cls


def _of(plugin: Plugin, called: str | None = None) -> list[MethodInfo]:
    """Returns the methods of a plugin, or the one that is called so."""
    names: dict[str, list[str]] = {}
    for name, place in plugin.methods.items():
        if called is None or place == plugin.methods[called]:
            names.setdefault(place, []).append(name)  # further names of one class are its aliases
    return [MethodInfo(n[0], plugin.name, plugin.distribution, p, tuple(n[1:])) for p, n in names.items()]


def _presets_of(plugin: Plugin) -> list[MethodInfo]:
    """Returns the presets of a plugin whose methods are installed."""
    place = {info.name: info.location for each in registry().plugins.values() for info in _of(each)}
    return [
        MethodInfo(name, plugin.name, plugin.distribution, place[preset.method], (), preset)
        for name, preset in plugin.presets.items()
        if preset.method in place
    ]


def _of_run_time() -> list[MethodInfo]:
    return [
        MethodInfo(name, RUNTIME, "registered at run time", f"{cls.__module__}:{cls.__qualname__}", cls.aliases)
        for name, cls in _registered.items()
    ]


def _ordered(found: Iterable[MethodInfo]) -> list[MethodInfo]:
    return sorted(found, key=lambda info: (info.name, info.plugin))


def methods(category: str | None = None, *, presets: bool = False) -> list[MethodInfo]:
    """Returns the methods of all loaded plugins, by name; with `category`, only the methods of that category of the
    survey. A call with `category` imports the modules of all methods; other calls import none of them. With `presets`,
    the presets are included.

    Raises:
        PluginError: `category` is given and a method's module cannot be imported.
    """
    of_presets = map(_presets_of, registry().plugins.values()) if presets else ()
    listed = _ordered(chain(*map(_of, registry().plugins.values()), _of_run_time(), *of_presets))
    return [info for info in listed if category is None or info.category == category]


def method(name: str) -> type[Method]:
    """Returns the method class called `name`; ``"plugin/name"`` if two plugins have one. Capitals and dashes do not
    matter. A preset has the class of its method, with other defaults.

    Raises:
        UnknownMethod: no plugin has the method. The message lists similar names, plugins that failed to load, and
            packages to install.
        AmbiguousMethod: several plugins have the method; the message names their distributions.
        PluginError: the method's module cannot be imported, or its class breaks the contract.
    """
    plugin, slash, short = name.rpartition("/")
    found = _called(short, plugin if slash else None) or _called(_plain(short), plugin if slash else None)
    if len(found) > 1:
        where = " and ".join(f"{info.distribution} (write {info.plugin + '/' + short!r})" for info in found)
        raise AmbiguousMethod(f"several plugins have a method {short!r}: {where}")
    if not found:
        raise UnknownMethod(_unknown(name, short, [info.name for info in methods()]))
    return _load(found[0])


def _called(name: str, plugin: str | None) -> list[MethodInfo]:
    """Returns the methods of a name, of one plugin where it is given; or the presets, where no method has it."""
    plugins = registry().plugins.values()
    having = [each for each in plugins if name in each.methods]
    listed = [*chain(*(_of(each, name) for each in having), _of_run_time())]
    found = [info for info in listed if name in (info.name, *info.aliases)] or [
        info for each in plugins if name in each.presets for info in _presets_of(each) if info.name == name
    ]
    return _ordered(info for info in found if plugin in (None, info.plugin))


def _plain(name: str) -> str:
    """Returns a name as people write it ("LoRA", "houlsby-adapter", "LoRA+") as methods are called."""
    return name.lower().replace("-", "_").replace("+", "_plus").replace(" ", "_")


def _load(info: MethodInfo) -> type[Method]:
    if info.plugin == RUNTIME:
        return _registered[info.name]
    key = f"{info.plugin}/{info.name}"
    if info.preset is not None:
        if key not in _loaded:
            _loaded[key] = class_of(info.name, info.preset, method(info.preset.method))
    elif key not in _loaded:
        module, _, attribute = info.location.partition(":")
        try:
            cls = check_method_class(getattr(importlib.import_module(module), attribute))
        except (ImportError, AttributeError) as error:
            raise PluginError(f"method {info.name!r} of {info.distribution} cannot be imported: {error}") from error
        if (cls.name, set(cls.aliases)) != (info.name, set(info.aliases)):
            called = ", ".join((cls.name, *cls.aliases))
            raise PluginError(
                f"{info.distribution} lists the method {info.name!r}, but the class {info.location} has the name "
                f"{called}"
            )
        _loaded[key] = cls
    return _loaded[key]


def _unknown(name: str, short: str, known: list[str]) -> str:
    lines = [f"no method named {name!r}"]
    presets = [info.name for info in methods(presets=True) if info.preset is not None]
    plain = _plain(short)
    close = difflib.get_close_matches(plain, sorted(set(known)), n=3) or difflib.get_close_matches(plain, presets, n=3)
    if close:
        lines.append(f"did you mean {' or '.join(repr(each) for each in close)}?")
    lines += [str(failure) for failure in registry().failures]
    if not close:
        missing = [f"peftcore-{each}" for each in CATEGORIES if each not in registry().plugins]
        if len(missing) == len(CATEGORIES):
            lines.append("no plugin is installed: pip install 'peftcore[all]'")
        elif missing:
            lines.append(f"it may be in a plugin that is not installed (pip install {' '.join(missing)})")
        lines.append(f"there are: {', '.join(known) or 'none'}")
    return "; ".join(lines)


def schema(name: str | None = None) -> dict[str, Any]:
    """Returns the JSON schema of one method's options; without a name, the schemas of all methods as alternatives that
    are distinguished by `method`."""
    if name is not None:
        return method(name).Config.model_json_schema()
    kinds = [method(f"{info.plugin}/{info.name}").Config for info in methods()]
    alternatives = {kind.model_fields["method"].default: kind.model_json_schema() for kind in kinds}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "oneOf": [{"$ref": f"#/$defs/{key}"} for key in alternatives],
        "$defs": alternatives,
        "discriminator": {"propertyName": "method"},
    }
