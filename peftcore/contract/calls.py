"""Records the calls of one module in one forward, so that the input of a call can be found from its output.

A composition uses this to combine operators that only change a module's input. Each operator runs as usual. Then the
composition looks up the input that the operator passed to the module, from the output that the module returned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from peftcore.errors import CompositionError


class Calls:
    """A module's forward that records its calls.

    Args:
        run: the module's forward. Its first argument is the input, a tensor.
    """

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run
        self._made: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._run(*args, **kwargs)
        self._made.append((output, args, kwargs))
        return output

    def given(self, output: Any) -> Tensor:
        """Returns the input of the recorded call that returned `output`.

        Raises:
            CompositionError: no call returned `output`, because an operator changed it.
        """
        args, kwargs = self._of(output)
        given: Tensor = args[0] if args else next(iter(kwargs.values()))
        return given

    def again(self, output: Any, given: Tensor) -> Any:
        """Returns the module's output for another input, with the other arguments of the call that returned `output`.

        Raises:
            CompositionError: no call returned `output`.
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
            "an operator with `only_inputs` returned another output than the module, so the input that it passed to "
            "the module is unknown: return the output of `call` unchanged"
        )
