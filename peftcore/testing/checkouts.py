"""Imports files from code of a paper's authors, and reads options from their commands. For scripts that compute frozen
numbers, which are reference numbers stored in a file."""

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
    """Imports a file and returns the module. `root` is inserted at the front of ``sys.path``, and is not removed
    afterwards.

    Args:
        file: the file, in a checkout of the authors' repository.
        root: the folder that contains the modules which the file imports; by default the file's folder.
        absent: dotted names of modules that the file imports but that are not needed. They are replaced by mocks.
    """
    root = file.parent if root is None else root
    for name in absent:
        sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None))
    sys.path.insert(0, str(root))
    return importlib.import_module(".".join(file.relative_to(root).with_suffix("").parts))


def flags(text: str) -> dict[str, Any]:
    """Returns the options of a command that is written in a shell script or a README, by name without dashes. Numbers
    are converted, and options without a value are True. Shell variables that the text sets are replaced by their
    values. If an option occurs several times, its last value is returned.

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
