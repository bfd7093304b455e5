"""Options in and out: validation with one readable error, JSON schema, and what `apply` accepts as a method."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar

import torch
from pydantic import ValidationError

from peftcore.contract import MethodConfig
from peftcore.errors import ConfigError, shown

C = TypeVar("C", bound=MethodConfig)

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}
"""The dtypes operators may have, by the names used in files."""


MAX_ERRORS = 1000
"""Wrong values that are named one by one: to describe a million of them takes seconds and a gigabyte."""


def described(error: ValidationError) -> list[dict[str, Any]]:
    """What is wrong with a model, one by one; where that is too much, in one line."""
    if error.error_count() > MAX_ERRORS:
        return [{"type": "many", "loc": (), "msg": f"{error.error_count():,} values are wrong", "input": "..."}]
    return [dict(each) for each in error.errors(include_url=False)]


def _explain(kind: type[MethodConfig], error: ValidationError) -> str:
    name = kind.model_fields["method"].default
    lines = []
    for each in described(error):
        place = ".".join(str(part) for part in each["loc"])
        if each["type"] == "extra_forbidden":
            options = sorted(set(kind.model_fields) - {"method"})
            close = difflib.get_close_matches(place[:100], options, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; it has: {', '.join(options)}"
            lines.append(f"{name} has no option {shown(place)}{hint}")
        else:
            lines.append(f"{name}: {place}={shown(each['input'])}: {each['msg']}")
    return "\n".join(lines)


def validate(kind: type[C], options: dict[str, Any]) -> C:
    """The options as a config of `kind`.

    Raises:
        ConfigError: naming method, field, value and rule, one line each.
    """
    try:
        return kind.model_validate(options)
    except ValidationError as error:
        raise ConfigError(_explain(kind, error)) from None


def validate_json(kind: type[C], text: str | bytes) -> C:
    """The same for JSON text (lists stand for tuples there)."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(_explain(kind, error)) from None


def dtype_of(name: str | torch.dtype | None) -> torch.dtype:
    """An operator dtype by name or as it is; float32 by default.

    Raises:
        ConfigError: not a floating-point dtype.
    """
    if name is None:
        return torch.float32
    dtype = DTYPES.get(name.removeprefix("torch.")) if isinstance(name, str) else name
    if dtype is None or dtype not in DTYPES.values():
        raise ConfigError(f"dtype={name!r}: operators may be {', '.join(DTYPES)}")
    return dtype


def schema(name: str | None = None) -> dict[str, Any]:
    """JSON schema of one method's options, or of all methods' as alternatives told apart by their `method` field."""
    from peftcore.catalogue import method, methods

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
