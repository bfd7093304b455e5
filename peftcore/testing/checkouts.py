"""Imports files of the authors' code, and reads options from their commands, for scripts that compute frozen
numbers."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock


def load(file: Path, root: Path | None = None, absent: Iterable[str] = ()) -> Any:
    """Returns the module imported from a file. `root` stays at the front of ``sys.path``.

    Args:
        file: the file in a checkout.
        root: the folder from which the file imports its own modules; by default the file's folder.
        absent: dotted names of imported modules that are not needed; they are replaced by mocks.
    """
    root = file.parent if root is None else root
    for name in absent:
        sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None))
    sys.path.insert(0, str(root))
    return importlib.import_module(".".join(file.relative_to(root).with_suffix("").parts))


def flags(text: str) -> dict[str, Any]:
    """Returns the options of a command in the text of a shell script or a README, by their names without dashes.
    Numbers are converted, and options without a value are True. Variables that the text sets are replaced by their
    values. If an option occurs several times, the last value is returned.

    Args:
        text: the text with the command; it should contain no other commands.
    """
    text = re.sub(r"(?m)(^|\s)#.*$", "", text).replace("\\\n", " ")
    variables = dict(re.findall(r"(?m)^\s*(?:export\s+)?(\w+)=[\"']?([^\s\"']*)", text))
    text = re.sub(r"\$\{?(\w+)\}?", lambda found: variables.get(found[1], found[0]), text)
    found = re.findall(r"(?<!\S)--?([A-Za-z][\w.-]*)(?:(?:=|[ \t]+)(?!--?[A-Za-z])([^\s]+))?", text)
    return {name: _value(value) if value else True for name, value in found}


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text.strip("\"'")
