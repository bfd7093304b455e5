"""What was called on a model, written down as a script that a user could have written; a failing history prints it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn

import peftcore
from peftcore import Injection

CALLS = ("activate", "apply", "load", "route", "call")
VERBS = ("bake", "disabled", "merge", "remove", "save", "swap", "trainable", "unmerge")


class Script:
    """The calls on one model since `begin`.

    Attributes:
        model: returns the model, which copies may replace.
        lines: the script.
    """

    def __init__(self, model: Callable[[], nn.Module], *begin: str) -> None:
        self.model, self.lines = model, list(begin)
        self._stack, self._inside, self._indent = ExitStack(), False, ""
        for name in CALLS:
            self._stack.enter_context(patch.object(peftcore, name, self._call(getattr(peftcore, name))))
        for name in VERBS:
            self._stack.enter_context(patch.object(Injection, name, self._verb(getattr(Injection, name))))

    def end(self) -> str:
        """Write down no more; returns the script."""
        self._stack.close()
        return "\n".join(self.lines)

    @contextmanager
    def block(self, line: str) -> Iterator[None]:
        """Context manager whose calls are within a block; one without calls is left out."""
        self.lines.append(f"{line}:")
        before, self._indent = len(self.lines), "    "
        try:
            yield
        finally:
            self._indent = ""
            if len(self.lines) == before:
                del self.lines[-1]

    def _call(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def called(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            said = f"peftcore.{function.__name__}(model{''.join(f', {each}' for each in _told(args, kwargs))})"
            with self._outermost(model, said):
                return function(model, *args, **kwargs)

        return called

    def _verb(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def called(injection: Injection, *args: Any, **kwargs: Any) -> Any:
            verb = f"peftcore.injections(model)[{injection.name!r}].{function.__name__}"
            with self._outermost(injection.model, f"{verb}({', '.join(_told(args, kwargs))})"):
                return function(injection, *args, **kwargs)

        return called

    @contextmanager
    def _outermost(self, model: nn.Module, line: str) -> Iterator[None]:
        """Context manager that writes down a call, unless it is one of another call, or on another model."""
        if self._inside or model is not self.model():
            yield
            return
        self.lines.append(self._indent + line)
        at = len(self.lines) - 1
        self._inside = True
        try:
            yield
        except BaseException as error:
            self.lines[at] += f"  # raises {type(error).__name__}"
            raise
        finally:
            self._inside = False


def _told(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    return [*map(_text, args), *(f"{name}={_text(value)}" for name, value in kwargs.items())]


def _text(value: Any) -> str:
    if isinstance(value, type):
        return repr(getattr(value, "name", value.__name__))
    if isinstance(value, dict) and any(isinstance(each, Tensor) for each in value.values()):
        return "tensors"
    return repr(value)
