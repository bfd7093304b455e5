"""`generate` caches the values computed from the weights from token to token, since nothing writes to the weights
within one call. It also records the prompt, which the model may receive in pieces."""

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
    """A ``generate`` that computes effective weights once and records its prompt."""

    name = "generate"
    having = Generates

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with caching(self.owners), _generating(self.owners, args, kwargs):
            return self.plain(*args, **kwargs)


@contextmanager
def _generating(owners: list[object], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Context manager in which forwards of the given hosts can read the prompt of ``generate``."""
    before = len(HERE.generating)
    rows = next((len(each) for each in (*args, *kwargs.values()) if isinstance(each, Tensor) and each.dim()), 0)
    prompt = _prompt(args, kwargs)
    try:
        HERE.generating.append((owners, rows, prompt))
        yield
    finally:
        del HERE.generating[before:]


def _prompt(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Prompt | None:
    """Returns the prompt that ``generate`` is given, as transformers reads its arguments: where the mask is longer than
    the ids, the ids continue the cache; otherwise they hold all tokens. None without ids."""
    ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        return None
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return Prompt(ids, 0)
    begin = max(mask.shape[1] - ids.shape[1], 0) if cache_in(kwargs) is not None else 0
    return Prompt(ids, begin, mask if mask.shape[1] == begin + ids.shape[1] else None)
