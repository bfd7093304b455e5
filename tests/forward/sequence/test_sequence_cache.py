"""Caches that hold rows in front: what they count outside, whose rows they hold, and what they refuse."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from sequence_toys import LENGTH, Rows, adapt, host, tokens
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

import peftcore
from peftcore.errors import SequenceError


def filled(model: nn.Module, cache: object = None, ids: torch.Tensor | None = None) -> object:
    """The cache after the tokens; the model's own unless one is given."""
    ids = tokens() if ids is None else ids
    found = model(input_ids=ids, past_key_values=cache, use_cache=True).past_key_values
    assert cache is None or found is cache
    return found


def goes_on(model: nn.Module, cache: object) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=tokens(length=1, seed=9), past_key_values=cache).logits
    return logits


def step(model: nn.Module) -> torch.Tensor:
    """The step behind the tokens, without any cache."""
    ids = torch.cat([tokens(), tokens(length=1, seed=9)], dim=1)
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[:, -1:]
    return logits


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "hybrid"])
@pytest.mark.parametrize("kind", ["none", "dynamic", "static"])
def test_a_cache_counts_the_tokens_of_the_user(name: str, kind: str) -> None:
    model, _ = host(name)
    adapt(model)
    given = None
    if kind == "dynamic":
        given = DynamicCache(config=model.config)
    elif kind == "static":
        given = StaticCache(config=model.config, max_cache_len=16)
    cache = filled(model, given)
    count = tokens().shape[1]
    assert int(cache.get_seq_length()) == count
    if kind == "static":
        assert cache.get_max_length() == (8 if name == "gemma3_text" else 16)  # the window; what was asked for
    assert isinstance(cache, StaticCache if kind == "static" else DynamicCache)
    torch.testing.assert_close(goes_on(model, cache), step(model), rtol=1e-10, atol=1e-10)
    assert int(cache.get_seq_length()) == count + 1


def test_mask_sizes_leave_the_rows_out() -> None:
    """9 places are taken and 8 fit into the window: it begins with the third row, so the tokens are 7, as without."""
    model, _ = host("hybrid")
    adapt(model)
    cache = filled(model)
    assert cache.is_sliding == [True, False]
    assert cache.get_mask_sizes(1, 0) == (tokens().shape[1] + 1, 0)
    assert cache.get_mask_sizes(1, 1) == (tokens().shape[1] + 1, 0)
    for seed in (1, 2, 3):
        model(input_ids=tokens(length=1, seed=seed), past_key_values=cache)
    assert cache.get_mask_sizes(1, 0) == (8, 2)  # 12 taken: 4 have left the window, 3 of them rows
    assert cache.get_mask_sizes(1, 1) == (tokens().shape[1] + 4, 0)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@torch.no_grad()
def test_copies_of_a_cache_know_what_they_hold(way: str) -> None:
    model, _ = host("llama")
    adapt(model)
    cache = filled(model)
    twin = copy.deepcopy(cache) if way == "deepcopy" else pickle.loads(pickle.dumps(cache))
    expected = goes_on(model, cache)
    assert torch.equal(goes_on(copy.deepcopy(model), twin), expected)


def test_beams_crop_and_reset() -> None:
    model, _ = host("llama")
    adapt(model)
    cache = filled(model)
    cache.crop(-2)
    assert cache.get_seq_length() == tokens().shape[1] - 2
    again = model(input_ids=tokens()[:, -2:], past_key_values=cache).logits
    torch.testing.assert_close(again, model(input_ids=tokens()).logits[:, -2:], rtol=1e-10, atol=1e-10)
    cache.reorder_cache(torch.tensor([1, 0]))
    flipped = model(input_ids=tokens(length=1, seed=9), past_key_values=cache).logits
    ids = torch.cat([tokens().flip(0), tokens(length=1, seed=9)], dim=1)
    torch.testing.assert_close(flipped, model(input_ids=ids).logits[:, -1:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("early", [False, True])
def test_static_caches_are_used_again(early: bool) -> None:
    """Room is made when rows enter, and given back by reset: also with other rows, or none."""
    model, _ = host("llama")
    base, injection, _ = adapt(model)
    cache = StaticCache(config=model.config, max_cache_len=7)
    if early:
        cache.early_initialization(2, 2, 16, torch.float64, torch.device("cpu"))
    torch.testing.assert_close(goes_on(model, filled(model, cache)), step(model), rtol=1e-10, atol=1e-10)
    assert cache.layers[0].keys.shape[-2] == 7 + LENGTH
    cache.reset()
    assert type(cache) is StaticCache and cache.get_max_length() == 7
    with injection.disabled():
        torch.testing.assert_close(goes_on(model, filled(model, cache)), step(base), rtol=1e-10, atol=1e-10)
    cache.reset()
    peftcore.apply(model, Rows, name="other", length=5, dtype="float64")
    torch.testing.assert_close(goes_on(model, filled(model, cache)), step(model), rtol=1e-10, atol=1e-10)
    assert cache.layers[0].keys.shape[-2] == 7 + LENGTH + 5


def test_static_windows_keep_their_size() -> None:
    model, _ = host("hybrid")
    adapt(model)
    cache = StaticCache(config=model.config, max_cache_len=30)
    filled(model, cache)
    assert [layer.keys.shape[-2] for layer in cache.layers] == [8, 30 + LENGTH]
    assert [cache.get_max_length(index) for index in (0, 1, None)] == [8, 30, 30]


def test_a_cache_filled_without_the_rows_is_refused() -> None:
    model, _ = host("llama")
    _, injection, _ = adapt(model)
    with injection.disabled():
        cache = filled(model)
    with pytest.raises(SequenceError, match="filled without the active soft prompt"):
        goes_on(model, cache)


def test_a_cache_filled_with_the_rows_is_refused_without_them() -> None:
    model, _ = host("llama")
    base, injection, _ = adapt(model)
    cache = filled(model)
    before = cache.get_seq_length()
    with injection.disabled(), pytest.raises(SequenceError, match="3 rows of soft prompts that are not active"):
        goes_on(model, cache)
    with pytest.raises(SequenceError, match="are not active now"):
        goes_on(base, cache)
    assert cache.get_seq_length() == before
    torch.testing.assert_close(goes_on(model, cache), step(model), rtol=1e-10, atol=1e-10)


def test_a_cache_of_another_prompt_is_refused() -> None:
    """Also where both have as many rows, so that no count could tell."""
    model, _ = host("llama")
    adapt(model)
    peftcore.apply(model, Rows, name="other", dtype="float64", seed=7)
    with peftcore.activate(model, "toy_rows"):
        cache = filled(model)
    with peftcore.activate(model, "other"), pytest.raises(SequenceError, match="another soft prompt"):
        goes_on(model, cache)
    with peftcore.activate(model, "toy_rows", "other"), pytest.raises(SequenceError, match="another soft prompt"):
        goes_on(model, cache)


def test_a_cache_that_nobody_knows_is_refused() -> None:
    model, _ = host("llama")
    adapt(model)
    with pytest.raises(SequenceError, match="tuple is not a cache"):
        model(input_ids=tokens(), past_key_values=((torch.zeros(1), torch.zeros(1)),))


def test_decoders_that_read_keep_their_part_of_the_cache_apart() -> None:
    model, inputs = host("t5")
    adapt(model, target="decoder")
    output = model(**inputs, use_cache=True)
    cache = output.past_key_values
    assert isinstance(cache, EncoderDecoderCache)
    answers = inputs["decoder_input_ids"].shape[1]
    assert cache.get_seq_length() == cache.self_attention_cache.get_seq_length() == answers
    assert cache.cross_attention_cache.get_seq_length() == inputs["input_ids"].shape[1]
    given = {"encoder_outputs": (output.encoder_last_hidden_state,), "past_key_values": cache}
    last = model(**given, decoder_input_ids=inputs["decoder_input_ids"][:, :1]).logits
    whole = torch.cat([inputs["decoder_input_ids"], inputs["decoder_input_ids"][:, :1]], dim=1)
    expected = model(**{**inputs, "decoder_input_ids": whole}, use_cache=False).logits[:, -1:]
    torch.testing.assert_close(last, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_forward_that_fails_leaves_an_empty_cache_as_it_was(kind: str) -> None:
    model, _ = host("llama")
    adapt(model)
    cache = DynamicCache(config=model.config)
    if kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=7)
    before, failing = type(cache), model.model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            filled(model, cache)
    failing.remove()
    assert type(cache) is before and cache.get_seq_length() == 0
    assert cache.get_max_length() == (7 if kind == "static" else -1)
    torch.testing.assert_close(goes_on(model, filled(model, cache)), step(model), rtol=1e-10, atol=1e-10)


def test_a_forward_that_fails_half_way_leaves_a_cache_that_is_refused_until_reset() -> None:
    model, _ = host("llama")
    adapt(model)
    cache = StaticCache(config=model.config, max_cache_len=7)
    failing = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        filled(model, cache)
    failing.remove()
    with pytest.raises(SequenceError, match="filled without"):
        filled(model, cache)
    cache.reset()
    torch.testing.assert_close(goes_on(model, filled(model, cache)), step(model), rtol=1e-10, atol=1e-10)
