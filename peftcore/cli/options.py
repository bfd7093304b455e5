"""A method's options as they stand on a command line: ``--option rank=16 --option scaling=sqrt_rank``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from peftcore.cli.errors import BadInput


def parse_options(given: Iterable[str]) -> dict[str, Any]:
    """Names and values; a value is JSON (``16``, ``true``, ``null``, ``[1, 2]``), or else a text as it stands."""
    options: dict[str, Any] = {}
    for each in given:
        name, equals, value = each.partition("=")
        name = name.strip()
        if not equals or not name:
            raise BadInput(f"--option {each}: write it as NAME=VALUE, such as rank=16")
        if name in options:
            raise BadInput(f"--option {name} is given twice")
        options[name] = parse_value(value)
    return options


def parse_value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
