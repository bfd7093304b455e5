"""The options of a method: a typed, strict, immutable `MethodConfig`, and validation with one readable error."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self, TypeVar, get_args, get_origin

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import to_json

from peftcore.errors import ConfigError, PluginError, shown

RESERVED = frozenset(
    {
        "model",
        "name",
        "target",
        "exclude",
        "train",
        "data",
        "seed",
        "dtype",
        "host",
        "trainable",
        "active",
        "strict",
        "room",
    }
)
"""Argument names of `apply` and `load`, which a method option cannot have."""


Share = Annotated[float, Field(ge=0.0, lt=1.0)]
"""Type of an option that is a probability or a share: at least 0 and less than 1."""

MAX_OVERRIDES = 10_000
MAX_GLOBS = 100_000
"""Limit on the total length, in characters, of the globs with wildcards: each glob is matched against many paths."""


def fits(value: Any) -> bool:
    """Whether a number is small enough to compute with in tensors. False for integers of more than 64 bits, and for
    floats above 1e30 in magnitude. Infinities and NaN return True, because other checks reject them."""
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return not isinstance(value, float) or abs(value) <= 1e30 or not math.isfinite(value)


def _is_glob(pattern: str) -> bool:
    return any(sign in pattern for sign in "*?[")


def matches(path: str, pattern: str) -> bool:
    """Whether a glob of `MethodConfig.overrides` matches the path of a site."""
    return fnmatch.fnmatchcase(path, pattern) if _is_glob(pattern) else path == pattern


class MethodConfig(BaseModel):
    """Base class of the options of one method. Options are typed, strict and immutable, and unknown keys raise an
    error. The docstring under a field becomes its description in the JSON schema."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    overridable: ClassVar[tuple[str, ...] | None] = None
    """The names of the options that `overrides` may change; None for all options. If the sites of a method share
    parameters, only options that do not affect the shared parameters are listed. With ``()``, the method takes no
    overrides."""

    method: str
    """Name of the method these options belong to."""
    overrides: dict[str, dict[str, Any]] = Field(default_factory=dict, max_length=MAX_OVERRIDES)
    """Options for some sites that differ from those of the others: ``{"*.layers.0.*": {"rank": 16}}``. Keys are globs
    for site paths; for each site the first glob that matches is used."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        taken = RESERVED.intersection(cls.model_fields)
        if taken:
            raise PluginError(
                f"{cls.__name__}: {', '.join(sorted(taken))} are arguments of apply and cannot be options"
            )

    @model_validator(mode="after")  # one before reads the JSON, and lists stand for tuples no longer
    def _numbers(self) -> Self:
        left: list[Any] = [getattr(self, name) for name in type(self).model_fields]
        while left:
            each = left.pop()
            if isinstance(each, dict):
                left += each.values()
            elif isinstance(each, list | tuple):
                left += each
            elif not isinstance(each, str) and not fits(each):
                raise ValueError(f"{shown(each)} is a number that no tensor can hold")
        return self

    @field_validator("overrides")
    @classmethod
    def _globs(cls, overrides: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        if sum(len(each) for each in overrides if _is_glob(each)) > MAX_GLOBS:
            raise ValueError(f"their globs have more than {MAX_GLOBS:,} characters")
        if cls.overridable is None:
            return overrides
        names = dict.fromkeys(name for changes in overrides.values() for name in changes if name in cls.model_fields)
        if fixed := [name for name in names if name not in cls.overridable]:
            rest = (
                f"overrides can change {' and '.join(cls.overridable)}"
                if cls.overridable
                else "the method takes no overrides"
            )
            raise ValueError(
                f"{' and '.join(fixed)} cannot change at single sites, because the sites share parameters: set one "
                f"value for all sites; {rest}"
            )
        return overrides

    @classmethod
    def for_tasks(cls, options: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """Returns the options with the names of tasks added, for methods that treat tasks differently. Each row of the
        data belongs to a task, which `peftcore.call(model, task=...)` names in a call. By default the options are
        returned unchanged.

        Raises:
            ConfigError: the options already name other tasks.
        """
        return dict(options)

    def replace(self, **changes: Any) -> Self:
        """Returns a copy of the options with some of them changed. The copy is validated.

        Raises:
            ConfigError: an option is unknown or its value breaks a rule.
        """
        return validate(type(self), {**self.model_dump(exclude=set(changes), exclude_unset=True), **changes})

    def at(self, path: str) -> Self:
        """Returns the options for the site at `path`, with `overrides` applied.

        Raises:
            ConfigError: an override has an unknown option, or a value that breaks a rule.
        """
        for pattern, changes in self.overrides.items():
            if matches(path, pattern):
                options = {**self.model_dump(), **changes, "overrides": {}}
                # By way of JSON: a file holds a list for a tuple, which means the same.
                return validate_json(type(self), to_json(options, inf_nan_mode="constants", fallback=repr))
        return self


C = TypeVar("C", bound=MethodConfig)

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}
"""The dtypes that operators may have, by the names used in files."""


MAX_ERRORS = 1000
"""The largest number of wrong values that are reported one by one. A report of a million values would take seconds and
a gigabyte."""


def described(error: ValidationError) -> list[dict[str, Any]]:
    """Returns the errors of a pydantic validation, one entry each; if there are more than `MAX_ERRORS`, a single entry
    with their number."""
    if error.error_count() > MAX_ERRORS:
        return [{"type": "many", "loc": (), "msg": f"{error.error_count():,} values are wrong", "input": "..."}]
    return [dict(each) for each in error.errors(include_url=False)]


Advice = Callable[[str], str | None]
"""Type of functions that get the name of an unknown option. They return advice if another library has that option,
otherwise None."""


def no_advice(option: str) -> None:
    """Returns None: there is no advice for any option."""


def _explain(kind: type[MethodConfig], error: ValidationError, advice: Advice = no_advice) -> str:
    name = kind.model_fields["method"].default
    lines = []
    for each in described(error):
        place = ".".join(str(part) for part in each["loc"])
        if each["type"] == "extra_forbidden":
            options = sorted(set(kind.model_fields) - {"method"})
            close = difflib.get_close_matches(place[:100], options, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; it has: {', '.join(options)}"
            if instead := advice(place):
                hint = f", which is peft's; {instead}"
            lines.append(f"{name} has no option {shown(place)}{hint}")
        else:
            lines.append(f"{name}: {place}={shown(each['input'])}: {each['msg']}")
    return "\n".join(lines)


def validate(kind: type[C], options: dict[str, Any], advice: Advice = no_advice) -> C:
    """Returns the options as a config of class `kind`. A list is accepted where the class has a tuple, because YAML and
    command-line flags have no tuples.

    Raises:
        ConfigError: an option is unknown or breaks a rule. The message has one line for each error, with method, field,
            value and rule; for unknown options it has the text of `advice`.
    """
    try:
        return kind.model_validate({name: _as_asked(kind, name, value) for name, value in options.items()})
    except ValidationError as error:
        raise ConfigError(_explain(kind, error, advice)) from None


def _as_asked(kind: type[MethodConfig], name: str, value: Any) -> Any:
    field = kind.model_fields.get(name)
    if field is None or not isinstance(value, list):
        return value
    kinds = (field.annotation, *get_args(field.annotation))
    return tuple(value) if any(get_origin(each) is tuple for each in kinds) else value


def validate_json(kind: type[C], text: str | bytes) -> C:
    """Returns options that are given as JSON text, as a config of class `kind`. A list is accepted where the class has
    a tuple.

    Raises:
        ConfigError: an option is unknown or breaks a rule. The message has one line for each error, with method, field,
            value and rule.
    """
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(_explain(kind, error)) from None


def dtype_of(name: str | torch.dtype | None) -> torch.dtype:
    """Returns the dtype called `name`; `name` itself if it already is a dtype; float32 if it is None.

    Raises:
        ConfigError: the dtype is not one of `DTYPES`.
    """
    if name is None:
        return torch.float32
    dtype = DTYPES.get(name.removeprefix("torch.")) if isinstance(name, str) else name
    if dtype is None or dtype not in DTYPES.values():
        raise ConfigError(f"dtype={name!r} is not supported for operators: use one of {', '.join(DTYPES)}")
    return dtype
