"""A separate cache for an extra pass over the model, or for a network in parallel with it, in addition to the cache
that the model's forward fills.

During generation each forward sees only the new tokens. A pass with an adapter off (`ForwardContext.without`) needs the
cached states that earlier passes of this kind computed, not those of the adapted forwards. They are kept as more layers
after those of the model's cache, so code that reorders, repeats, crops or empties the cache also does so to them.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch

from peftcore.errors import SequenceError
from peftcore.forward.sequence.sequence_cache import is_filled, self_attention_cache
from peftcore.roles.stacks import cache_in


class PassCache:
    """Finds the cache of one operator's extra passes in the model's cache; copies of the model share it."""

    def __init__(self) -> None:
        self.stamp = uuid.uuid4().hex

    def beside(self, cache: Any, config: Any = None) -> Any:
        """Returns the cache for the pass, for the `caches` of `ForwardContext.without`.

        Args:
            cache: the model's cache, before its forward; in addition to the model's layers it has those of earlier
                passes.
            config: a config of transformers, for a network that is not the model's stack and has other layers.

        Raises:
            SequenceError: `cache` holds tokens that earlier passes did not process; or it is not a cache of
                transformers.
        """
        own = self_attention_cache(cache)
        mine = self._layers(own)
        if not mine and is_filled(own):
            raise SequenceError(_unseen(own.get_seq_length()))
        view = copy.copy(own)  # the same class, sizes and settings
        fresh = _layers_for(config, own) if config is not None else own.layers
        view.layers = mine or [copy.deepcopy(layer) for layer in fresh if "pass" not in vars(layer)]
        if mine and not torch.compiler.is_compiling():
            with suppress(ValueError, AttributeError):  # caches of states count no tokens
                if (unseen := int(own.get_seq_length()) - int(view.get_seq_length())) > 0:
                    raise SequenceError(_unseen(unseen))
        return view

    def keep(self, given: Mapping[str, Any], output: Any, of_pass: Any) -> None:
        """Store the cache of a pass after the model's own layers in the cache. Call it after the model's forward.

        Args:
            given: the arguments of the forward by name.
            output: the output of the forward; if no cache was passed, it contains the new cache.
            of_pass: the output of the pass.
        """
        cache, mine = _cache_of(output), _cache_of(of_pass)
        cache = cache_in(given) if cache is None else cache
        if cache is None or mine is None:
            return
        own = self_attention_cache(cache)
        if not self._layers(own):
            layers = self_attention_cache(mine).layers
            for layer in layers:
                setattr(layer, "pass", self.stamp)
            own.layers.extend(layers)

    def _layers(self, own: Any) -> list[Any]:
        return [layer for layer in own.layers if vars(layer).get("pass") == self.stamp]


def _layers_for(config: Any, own: Any) -> list[Any]:
    """Returns empty layers for a network with a config: as large as those of the model's cache where these are static;
    none yet where that cache adds layers of one kind as it goes, among which those of another kind would change what
    the model's masks are made for."""
    from transformers.cache_utils import DynamicCache, StaticCache

    if own.layer_class_to_replicate is not None:
        return []
    if isinstance(own, StaticCache):
        most = max(vars(layer).get("max_cache_len", 0) for layer in own.layers)
        return StaticCache(config=config, max_cache_len=most).layers
    return DynamicCache(config=config).layers


def _unseen(count: Any) -> str:
    return (
        f"this cache holds {count} tokens that were processed with the adapter off: start with an empty cache, and "
        "keep the adapter active while it fills"
    )


def _cache_of(output: Any) -> Any:
    """Returns the cache in the output of a model of transformers."""
    return cache_in(output) if isinstance(output, Mapping) else None
