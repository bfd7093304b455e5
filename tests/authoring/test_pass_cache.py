"""The cache of an extra pass goes where the model's goes, and one without it is refused."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache

import peftcore
from peftcore.author import PassCache
from peftcore.errors import SequenceError


def filled(layers: int = 2, tokens: int = 3, batch: int = 2) -> DynamicCache:
    cache = DynamicCache()
    for layer in range(layers):
        cache.update(*torch.randn(2, batch, 1, tokens, 4).unbind(0), layer)
    return cache


class Output(dict[str, Any]):
    """What a model of transformers returns."""


def kept(own: PassCache) -> tuple[DynamicCache, DynamicCache]:
    """A model's cache, and that of a pass behind it."""
    cache, of_pass = filled(), filled()
    own.keep({}, Output(past_key_values=cache), Output(past_key_values=of_pass))
    return cache, of_pass


def test_the_first_pass_gets_an_empty_cache_of_the_same_kind() -> None:
    cache = DynamicCache()
    view = PassCache().beside(cache)
    assert type(view) is DynamicCache and view is not cache
    view.update(torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4), 0)
    assert cache.get_seq_length() == 0 and not cache.layers


def test_the_next_pass_goes_on_where_the_last_one_ended() -> None:
    own = PassCache()
    cache, of_pass = kept(own)
    view = own.beside(cache)
    assert len(cache.layers) == 4 and torch.equal(view.layers[1].keys, of_pass.layers[1].keys)
    view.update(torch.ones(2, 1, 1, 4), torch.ones(2, 1, 1, 4), 0)
    assert own.beside(cache).get_seq_length() == 4 and cache.get_seq_length() == 3
    own.keep({}, Output(past_key_values=cache), Output(past_key_values=view))
    assert len(cache.layers) == 4  # nothing is added twice


@pytest.mark.parametrize("change", ["reordered", "cropped", "repeated", "emptied"])
def test_it_follows_the_cache(change: str) -> None:
    own = PassCache()
    cache, of_pass = kept(own)
    before = of_pass.layers[0].keys.clone()
    if change == "reordered":
        cache.reorder_cache(torch.tensor([1, 0]))
        assert torch.equal(own.beside(cache).layers[0].keys, before.flip(0))
    elif change == "cropped":
        cache.crop(-2)
        assert torch.equal(own.beside(cache).layers[0].keys, before[:, :, :1])
    elif change == "repeated":
        cache.batch_repeat_interleave(2)
        assert torch.equal(own.beside(cache).layers[0].keys, before.repeat_interleave(2, 0))
    else:
        cache.reset()
        assert own.beside(cache).get_seq_length() == 0


def test_a_cache_that_no_pass_has_seen_is_refused() -> None:
    own, other = PassCache(), PassCache()
    cache, _ = kept(other)
    with pytest.raises(SequenceError, match="3 tokens"):
        own.beside(cache)
    with pytest.raises(SequenceError, match="not a cache"):
        own.beside(object())


def test_tokens_of_which_no_pass_was_told_are_refused() -> None:
    own = PassCache()
    cache, _ = kept(own)
    cache.update(*torch.randn(2, 2, 1, 2, 4).unbind(0), 0)
    with pytest.raises(SequenceError, match="2 tokens that were processed with the adapter off"):
        own.beside(cache)


def test_a_network_with_other_layers_gets_its_own() -> None:
    own, config = PassCache(), LlamaConfig(num_hidden_layers=3)
    made = own.beside(DynamicCache(config=LlamaConfig(num_hidden_layers=1)), config)
    assert [type(layer) for layer in made.layers] == [DynamicLayer] * 3
    grows = own.beside(DynamicCache(), MistralConfig(num_hidden_layers=3, sliding_window=2))
    grows.update(torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4), 2)
    assert [type(layer) for layer in grows.layers] == [DynamicLayer] * 3, "of the kind that the model's has"
    static = own.beside(StaticCache(config=LlamaConfig(num_hidden_layers=1), max_cache_len=7), config)
    assert [layer.max_cache_len for layer in static.layers] == [7] * 3


def test_without_caches_nothing_is_kept() -> None:
    given: dict[str, Any] = {"past_key_values": None}
    PassCache().keep(given, (torch.ones(1),), (torch.ones(1),))
    cache = filled()
    PassCache().keep({"past_key_values": cache}, (torch.ones(1),), Output(past_key_values=filled()))
    assert len(cache.layers) == 4 and peftcore.author.PassCache is PassCache
