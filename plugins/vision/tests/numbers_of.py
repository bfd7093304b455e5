"""The scripts beside frozen numbers, whose tensors tests use again."""

import importlib.util
from pathlib import Path
from typing import Any


def module_of(name: str) -> Any:
    """The script of a method as a module."""
    spec = importlib.util.spec_from_file_location(
        f"numbers_of_{name}", Path(__file__).parent / "numbers" / f"{name}.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
