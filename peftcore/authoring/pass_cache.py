"""A separate cache for an additional forward pass of the model without an adapter, or for a network in parallel with
the model. It is stored inside the model's own cache.

During generation each forward gets only the new tokens. An additional pass without an adapter
(`ForwardContext.without`) needs the cache that earlier passes without the adapter have filled, not the cache of the
adapted forwards. Its layers are appended to the layers of the model's cache. So code that reorders, repeats, crops or
empties the model's cache does the same to them.
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
    """Finds the cache of one operator's additional passes inside the model's cache. Copies of the operator find the
    same cache."""

    def __init__(self) -> None:
        self.stamp = uuid.uuid4().hex

    def beside(self, cache: Any, config: Any = None) -> Any:
        """Returns the cache for an additional pass. Use it for the argument `caches` of `ForwardContext.without`.

        Args:
            cache: the model's cache before the model's forward. It may contain layers of earlier additional passes.
            config: the config of the network, if the pass runs another network than the model; a config of
                transformers.

        Raises:
            SequenceError: `cache` contains tokens that the earlier passes did not process; or it is not a cache of
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
        """Append the cache of an additional pass to the layers of the model's cache. Call it after the model's forward.

        Args:
            given: the arguments of the model's forward by name.
            output: the output of the model's forward. If no cache was passed, it contains the new cache.
            of_pass: the output of the additional pass.
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
    """Returns empty cache layers for a network with this config. If the model's cache is static, they are as large as
    its layers. If the model's cache creates its layers during forwards, all of one class, the result is empty: layers
    of another class would change the model's attention masks."""
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
    """Returns the cache in the output of a model of transformers; None if there is none."""
    return cache_in(output) if isinstance(output, Mapping) else None
