"""What the test of a method tells the conformance kit: its options on each host, and its context."""

import importlib.util
import sys
from pathlib import Path

import peftcore
from peftcore.testing.doors import Declared

ROOT = Path(__file__).parents[2]
HELPERS = [str(ROOT / "tests" / name) for name in ("cli", "docs", "hosts", "kit", "side_by_side")]
"""Where tests of methods import from."""


def declared(info: peftcore.MethodInfo) -> Declared:
    """The arguments of `conformance` in the test of a method."""
    path = ROOT / f"plugins/{info.plugin}/tests/test_{info.name}.py"
    sys.path[:0] = [each for each in (*HELPERS, str(path.parent)) if each not in sys.path]
    spec = importlib.util.spec_from_file_location(f"declared_{info.name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = [getattr(each, "declared", None) for each in vars(module).values()]
    return next(each for each in found if isinstance(each, Declared) and each.method.name == info.name)
