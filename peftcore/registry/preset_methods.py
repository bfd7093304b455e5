"""Builds the class of a preset: a copy of the method's class with the preset's options as defaults. Adapters made with
a preset are adapters of the method."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import create_model

from peftcore.contract.config import MethodConfig, validate
from peftcore.contract.method import Method
from peftcore.contract.presets import Preset
from peftcore.errors import ConfigError
from peftcore.registry.peft_names import peft_advice

_presets: dict[type[Method], tuple[type[Method], Preset]] = {}
"""The class of the method, and the `Preset`, by the class of the preset."""


def class_of(name: str, preset: Preset, cls: type[Method]) -> type[Method]:
    """Returns a copy of the method class `cls` whose options have the preset's values as defaults."""
    fields: dict[str, Any] = {"method": (Literal[name], name)}
    for option, value in preset.options.items():
        field = copy.copy(cls.Config.model_fields[option])  # with its limits and its description
        field.default, field.default_factory = value, None
        fields[option] = (field.annotation, field)
    config = create_model(f"{cls.Config.__name__}_{name}", __base__=cls.Config, __doc__=cls.Config.__doc__, **fields)
    members = _members(cls) | {
        "name": name,
        "Config": config,
        "tags": dataclasses.replace(
            cls.tags,
            paper=preset.paper,
            needs_data=cls.tags.needs_data if cls.tags.data_options is None else cls.looks_at_data(config(method=name)),
            **preset.claims,
        ),
    }
    if preset.target is not None:
        members |= {"target": preset.target, "alternatives": ()}
    made = type(cls.__name__, tuple(base for base in cls.__bases__), members)
    _presets[made] = (cls, preset)
    return made


def _members(cls: type[Method]) -> dict[str, Any]:
    return {
        key: each for key, each in vars(cls).items() if key not in ("__dict__", "__weakref__", "_abc_impl", "aliases")
    }


def preset_of(cls: type[Method]) -> Preset | None:
    """Returns the `Preset` of a class made by `class_of`; None for a class of a method."""
    return _presets[cls][1] if cls in _presets else None


def as_arguments(cls: type[Method]) -> tuple[type[Method], dict[str, Any]]:
    """Returns the class of the method, and the arguments of `apply` with which the method does the same as the preset
    `cls`. If `cls` is already the class of a method, there are no arguments."""
    if cls not in _presets:
        return cls, {}
    own, preset = _presets[cls]
    arguments = dict(preset.options)
    if preset.target is not None:
        arguments["target"] = preset.target
    if preset.train:
        arguments["train"] = preset.train
    return own, arguments


def method_of(cls: type[Method], options: Mapping[str, Any]) -> tuple[Method, MethodConfig]:
    """Returns a method object and its validated options. For the class of a preset, these are the preset's method, and
    the options of user and preset.

    Raises:
        ConfigError: an option is unknown, or its value breaks a rule; or the preset needs more than one call
            (`Preset.workflow`).
    """
    advice = functools.partial(peft_advice, cls.name, options=cls.Config.model_fields)
    if cls not in _presets:
        return cls(), validate(cls.Config, dict(options), advice)
    own, preset = _presets[cls]
    if preset.workflow:
        raise ConfigError(f"{cls.name} cannot be applied with one call: {preset.workflow}")
    checked = validate(cls.Config, dict(options), advice)
    return own(), validate(own.Config, checked.model_dump(exclude={"method"}))
