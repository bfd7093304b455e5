"""Imports files of the authors' code, for the scripts that make frozen numbers again."""

from __future__ import annotations

import importlib
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
