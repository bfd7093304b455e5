"""In a quick run functions that bitsandbytes compiles run as they are written: compiling them takes half a minute of
each process, for every shape anew, and they compute the same. Slow runs have them compiled, as users do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

PACKAGE = "bitsandbytes."


def pytest_configure(config: pytest.Config) -> None:
    if "not slow" not in config.getoption("markexpr"):
        return
    compiled = torch.compile

    def compile(model: Callable[..., Any] | None = None, **options: Any) -> Any:
        if model is None:
            return lambda model: compile(model, **options)
        return model if model.__module__.startswith(PACKAGE) else compiled(model, **options)

    torch.compile = compile  # type: ignore[assignment]
