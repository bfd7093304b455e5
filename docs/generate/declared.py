"""How a method is tried: that stands in its test file, where the conformance kit is told of it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from peftcore.testing.doors import Declared

ROOT = Path(__file__).parents[2]
HELPERS = [str(ROOT / "tests" / folder) for folder in ("hosts", "kit", "side_by_side")]


def declared(name: str) -> Declared | None:
    """What the test file of a method tells the kit."""
    for path in ROOT.glob(f"plugins/*/tests/test_{name}.py"):
        sys.path[:0] = [each for each in (*HELPERS, str(path.parent)) if each not in sys.path]
        spec = importlib.util.spec_from_file_location(f"declared_{name}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found = (getattr(each, "declared", None) for each in vars(module).values())
        return next((each for each in found if isinstance(each, Declared) and each.method.name == name), None)
    return None
