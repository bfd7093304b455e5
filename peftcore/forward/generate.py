"""`generate` keeps what is computed from the weights from token to token: nothing writes to them within one call."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from peftcore.forward.cache import caching
from peftcore.forward.instance_methods import InstanceMethod


@runtime_checkable
class Generates(Protocol):
    """A model with a ``generate`` method."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Decode token by token."""


class GeneratesFromCache(InstanceMethod):
    """A ``generate`` in which effective weights are computed once."""

    name = "generate"
    having = Generates

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with caching(self.owners):
            return self.plain(*args, **kwargs)
