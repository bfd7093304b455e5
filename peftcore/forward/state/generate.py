"""Caches the values computed from weights during one call of `generate`, since no code changes the weights in it. Also
records the prompt, because the model may receive it in several forwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from peftcore.forward.context.context import HERE
from peftcore.forward.context.tokens import Prompt
from peftcore.forward.tensors.cache import caching
from peftcore.libraries.instance_methods import InstanceMethod
from peftcore.roles.stacks import cache_in


@runtime_checkable
class Generates(Protocol):
    """A model with a ``generate`` method."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Decode token by token."""


class GeneratesFromCache(InstanceMethod):
    """A replacement for a model's ``generate`` that computes effective weights once and records the prompt."""

    name = "generate"
    having = Generates

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with caching(self.owners), _generating(self.owners, args, kwargs):
            return self.plain(*args, **kwargs)


@contextmanager
def _generating(owners: list[object], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Context manager that makes the prompt of ``generate`` available to forwards of the given hosts."""
    before = len(HERE.generating)
    rows = next((len(each) for each in (*args, *kwargs.values()) if isinstance(each, Tensor) and each.dim()), 0)
    prompt = _prompt(args, kwargs)
    try:
        HERE.generating.append((owners, rows, prompt))
        yield
    finally:
        del HERE.generating[before:]


def _prompt(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Prompt | None:
    """Returns the prompt in the arguments of ``generate``; None if they contain no ids.

    The arguments are interpreted as in transformers. If the mask is longer than the ids, the ids continue the cache.
    Otherwise the ids contain all tokens.
    """
    ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        return None
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return Prompt(ids, 0)
    begin = max(mask.shape[1] - ids.shape[1], 0) if cache_in(kwargs) is not None else 0
    return Prompt(ids, begin, mask if mask.shape[1] == begin + ids.shape[1] else None)
