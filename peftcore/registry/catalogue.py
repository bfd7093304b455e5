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
"""The possible values of `MethodInfo.kind`."""
BUDGETS = "peftcore.authoring.budgets:budgets"
"""The path of the function behind `MethodInfo.budgets`. The function is in a package above this one, so it is imported
by name when it is needed."""


@dataclass(frozen=True)
class MethodInfo:
    """One entry of `methods()`: a method or a preset. Reading an attribute imports at most the method's own module,
    except for `budgets`."""

    name: str
    """The name by which `apply` finds the method."""
    plugin: str
    """The name of the plugin that has the method. If two plugins have a method of the same name, ``"plugin/name"``
    identifies one of them."""
    distribution: str
    """The distribution that contains the method, with its version; "registered at run time" for methods added by
    `register`."""
    location: str = field(repr=False)
    """The path of the method's class, ``module:Class``."""
    aliases: tuple[str, ...] = ()
    """Other names of the method."""
    preset: Preset | None = None
    """The `Preset`, if the entry is a preset; None for a method."""

    def _tags(self) -> Tags:
        return method(f"{self.plugin}/{self.name}").tags

    @property
    def tags(self) -> Tags:
        """The declared abilities of the method. Reading it imports the method's module."""
        return self._tags()

    @property
    def category(self) -> str:
        """The category of the method, such as "additive" or "selective", from the survey arXiv 2410.19878. Reading it
        imports the method's module."""
        return self._tags().category

    @property
    def paper(self) -> str:
        """The arXiv number or another reference of the paper that defines the method. Reading it imports the method's
        module."""
        return self._tags().paper

    @property
    def mergeable(self) -> bool:
        """Whether the method can be merged into weights (`Tags.mergeable`). Reading it imports the method's module."""
        return self._tags().mergeable

    @property
    def per_row(self) -> bool:
        """Whether the rows of a batch can use different adapters of the method (`Tags.per_row`). Reading it imports the
        method's module."""
        return self._tags().per_row

    @property
    def needs_data(self) -> bool:
        """Whether `apply` needs ``data=`` (`Tags.needs_data`). Reading it imports the method's module."""
        return self._tags().needs_data

    @property
    def kind(self) -> str:
        """The purpose of the method. "trains": it trains new parameters. "combines": it combines adapters that are
        already trained. "quantized": it is for quantized models. Reading it imports the method's module."""
        if self.category == "quantized":
            return QUANTIZED
        parts = "parts" in method(f"{self.plugin}/{self.name}").Config.model_fields
        return COMBINES if self.category == "multitask" and parts else TRAINS

    @property
    def checked_against(self) -> str:
        """The implementations with whose results the plugin's tests compare this method, separated by commas. They are
        libraries with their versions, "the authors' code" (of the method's paper), or code of others. Empty if the
        tests compare only with the equation."""
        return sources(self.location, self.name if self.preset is None else self.preset.method)

    @property
    def compared(self) -> Mapping[str, tuple[str, ...]]:
        """The parts of the method that the plugin's tests compare with another implementation, by the name of that
        implementation as in `checked_against`. The parts are "outputs", "start" (the initial values), "trains" (which
        tensors train) and "defaults" (the defaults of options)."""
        return parts(self.location, self.name if self.preset is None else self.preset.method)

    @property
    def checked(self) -> bool:
        """Whether the plugin's tests compare the method with another implementation. Otherwise the method is *equation
        only*."""
        return bool(self.checked_against)

    @property
    def budgets(self) -> Mapping[str, int]:
        """The number of trainable values that the method has with default options, by name of a reference model. Models
        in which the method finds no target are left out.

        The method is planned on the meta device. The reference models are from transformers and diffusers, as far as
        these are installed. This takes one or two seconds.
        """
        found: Mapping[str, int] = imported(BUDGETS)(f"{self.plugin}/{self.name}")
        return found


def register(cls: M) -> M:
    """Register a method class at run time, without a package, for example in a notebook. It returns the class, so it
    can be used as a decorator. A method registered earlier under the same name is replaced.

    Raises:
        PluginError: the class breaks the contract.
    """
    check_method_class(cls)
    _registered[cls.name] = cls
    return cls


def _of(plugin: Plugin, called: str | None = None) -> list[MethodInfo]:
    """Returns the methods of a plugin; with `called`, only the method of that name."""
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
    """Returns the methods of all loaded plugins, sorted by name. With `category`, only the methods of that category.
    With `presets`, the presets are included. A call with `category` imports the modules of all methods; other calls
    import none of them.

    Raises:
        PluginError: `category` is given and a method's module cannot be imported.
    """
    of_presets = map(_presets_of, registry().plugins.values()) if presets else ()
    listed = _ordered(chain(*map(_of, registry().plugins.values()), _of_run_time(), *of_presets))
    return [info for info in listed if category is None or info.category == category]


def method(name: str) -> type[Method]:
    """Returns the method class called `name`. If two plugins have a method of that name, write ``"plugin/name"``. Case
    is ignored, and dashes count as underscores. For the name of a preset, it returns a copy of the method's class with
    other defaults.

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
    """Returns the methods of a name; if there are none, the presets of that name. With `plugin`, only those of that
    plugin."""
    plugins = registry().plugins.values()
    having = [each for each in plugins if name in each.methods]
    listed = [*chain(*(_of(each, name) for each in having), _of_run_time())]
    found = [info for info in listed if name in (info.name, *info.aliases)] or [
        info for each in plugins if name in each.presets for info in _presets_of(each) if info.name == name
    ]
    return _ordered(info for info in found if plugin in (None, info.plugin))


def _plain(name: str) -> str:
    """Converts a name as people write it ("LoRA", "houlsby-adapter", "LoRA+") to the form that names of methods
    have."""
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
    """Returns the JSON schema of one method's options. Without a name, it returns one schema with the options of all
    methods as alternatives, distinguished by the key `method`."""
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
