"""Imports files of the authors' code, and reads their command lines, for the scripts that make frozen numbers again."""

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
    """Returns the module of a file. The process is changed: it finds the modules of that folder first.

    Args:
        file: the file, in a checkout.
        root: the folder from which it imports modules of its own; by default the one that it is in.
        absent: dotted names of modules that it imports and of which nothing is needed: it gets mocks in their place.
    """
    root = file.parent if root is None else root
    for name in absent:
        sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None))
    sys.path.insert(0, str(root))
    return importlib.import_module(".".join(file.relative_to(root).with_suffix("").parts))


def flags(text: str) -> dict[str, Any]:
    """Returns the options that a command has in the text of a shell script or a README, by name without dashes: numbers
    as such, and True where no value follows. Variables that the text sets are put in; of an option that occurs again,
    the last one counts.

    Args:
        text: the text; cut the command out where there are several.
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
