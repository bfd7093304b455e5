"""Functions that return the source of forwards, for rules that read code. No code runs."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from types import FunctionType, MethodType
from typing import Any


class UnknownValue:
    """The class of `UNKNOWN`: a value that is unknown until the code runs."""


UNKNOWN = UnknownValue()


@functools.cache
def definition_of(function: Any) -> ast.FunctionDef | None:
    """Returns the code of a function as a tree; None if its source is not available."""
    if not isinstance(function, FunctionType):
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):
        return None
    [first, *_] = tree.body
    return first if isinstance(first, ast.FunctionDef) else None


def called(found: Any) -> Any:
    """Returns the function that runs when an attribute of a module is called: for an object with ``__call__``, that
    method."""
    call = inspect.getattr_static(type(found), "__call__", None)
    return MethodType(call, found) if isinstance(call, FunctionType) else found
