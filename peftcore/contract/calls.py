"""The calls of one module in one forward: what it was given is found by what it returned.

So operators that give a module another input can be put together in front of it: each runs as it always does, and what
it gave the module is looked up by its output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from peftcore.errors import CompositionError


class Calls:
    """A module's forward that takes note of its calls.

    Args:
        run: the forward. What is given is its first argument, a tensor; the others of a call stay as they are.
    """

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run
        self._made: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._run(*args, **kwargs)
        self._made.append((output, args, kwargs))
        return output

    def given(self, output: Any) -> Tensor:
        """Returns what the module was given where it returned this output.

        Raises:
            CompositionError: it never did: an operator changed the output.
        """
        args, kwargs = self._of(output)
        given: Tensor = args[0] if args else next(iter(kwargs.values()))
        return given

    def again(self, output: Any, given: Tensor) -> Any:
        """Returns the module's output for another input, with all else as in the call that returned `output`.

        Raises:
            CompositionError: there was no such call.
        """
        args, kwargs = self._of(output)
        if args:
            return self(given, *args[1:], **kwargs)
        return self(**{**kwargs, next(iter(kwargs)): given})

    def _of(self, output: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for made, args, kwargs in self._made:
            if made is output and (args or kwargs):
                return args, kwargs
        raise CompositionError(
            "an operator that says `only_inputs` returned what no call of the module did, so what it gave the module "
            "is not known"
        )
