"""Reads the user's options: a YAML file, and values that override it by dotted names. Each wrong option has its own
error message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from peftcore.contract.config import described
from peftcore.errors import BadInput, shown
from peftcore.utils.yaml_values import parse

B = TypeVar("B", bound=BaseModel)


def load(path: Path) -> dict[str, Any]:
    """Return the keys and values of a YAML file.

    Raises:
        BadInput: the file cannot be read, or does not contain keys and values.
    """
    try:
        values = parse(path.read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read ({error})") from None
    if not isinstance(values, dict):
        raise BadInput(f"{path}: must hold names and values, such as 'model: FOLDER'")
    return values


def read(kind: type[B], values: dict[str, Any], changes: Iterable[tuple[str, Any]], where: str = "the options") -> B:
    """Return validated options from a file's values, some of which are overridden by dotted names.

    Raises:
        BadInput: values are wrong; the error names all of them.
    """
    return validated(kind, changed(values, changes), where)


def changed(values: dict[str, Any], changes: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Set values by dotted names, such as ``training.steps``, and return all values.

    Raises:
        BadInput: a part of a dotted name is not a group of options.
    """
    for name, value in changes:
        _put(values, name, value)
    return values


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    *groups, last = name.split(".")
    for group in groups:
        inner = values.setdefault(group, {})
        if group == "method" and isinstance(inner, str):
            inner = values[group] = {"name": inner}
        if not isinstance(inner, dict):
            raise BadInput(f"{name}: {group} is {shown(inner)}, not a group of options")
        values = inner
    held = values.get(last)
    if last == "method" and isinstance(held, dict) and isinstance(value, str):
        value = {**held, "name": value}
    values[last] = value


def validated(kind: type[B], values: Any, where: str) -> B:
    """Return the values, validated as options of the class `kind`.

    Raises:
        BadInput: values are wrong. The error names all of them, and suggests similar names for unknown ones.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        wrong = [f"{where}: {_wrong(kind, each)}" for each in described(error)]
        raise BadInput("\n".join(wrong)) from None


def _wrong(kind: type[BaseModel], each: dict[str, Any]) -> str:
    place = ".".join(str(part) for part in each["loc"])
    if each["type"] == "missing":
        return f"{place} is missing"
    if each["type"] == "extra_forbidden":
        known = _options(kind, each["loc"][:-1])
        close = difflib.get_close_matches(str(each["loc"][-1])[:100], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}"
        return f"there is no option {shown(place)}; {hint}"
    return f"{place}={shown(each['input'])}: {each['msg']}" if place else each["msg"]


def _options(kind: type[BaseModel], path: Iterable[Any]) -> list[str]:
    for part in path:
        inner = kind.model_fields[part].annotation
        assert isinstance(inner, type) and issubclass(inner, BaseModel)
        kind = inner
    return list(kind.model_fields)
