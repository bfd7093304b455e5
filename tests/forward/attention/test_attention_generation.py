"""Edited attention in generation: equal to a prefilled cache, and the same text by every way to generate it."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from attention_hosts import METHODS, TWO_STACKS, host, inputs
from torch import Tensor
from transformers import DynamicCache

import peftcore

NEW = 8
GENERATORS = ["llama", "mistral", "gemma2", "gemma3", "deepseek_v3", "gpt2", "gpt_neox", "t5", "bart"]
CASES = [
    (name, implementation)
    for name in GENERATORS
    for implementation in ("eager", "sdpa")
    if (name, implementation) != ("gemma2", "sdpa")  # its scores are capped
]


def adapted(name: str, implementation: str, method: str = "in_front") -> tuple[Any, Any, dict[str, Tensor]]:
    """The bare host, the adapted one, and a prompt padded on the left."""
    base = host(name, implementation)
    model = deepcopy(base)
    peftcore.apply(model, METHODS[method])
    given = inputs(name)
    given.pop("decoder_input_ids", None)
    return base, model, given


def text(model: Any, given: dict[str, Tensor], **options: Any) -> Tensor:
    words: Tensor = model.generate(**given, max_new_tokens=NEW, do_sample=False, **options)
    return words[:, -NEW:]


def logits(model: Any, given: dict[str, Tensor], **options: Any) -> Tensor:
    """What greedy decoding chooses from at each token, [rows, tokens, words]."""
    made = model.generate(
        **given, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
    )
    return torch.stack(made.logits, 1)


def step_by_step(name: str, model: Any, given: dict[str, Tensor]) -> Tensor:
    """The same by whole forwards, with no cache and nothing of transformers' loop."""
    words, mask = given["input_ids"], given["attention_mask"]
    made = torch.zeros(len(words), 1, dtype=torch.long)  # decoders of two stacks start with 0
    found: list[Tensor] = []
    for _ in range(NEW):
        if name in TWO_STACKS:
            output = model(**given, decoder_input_ids=made, use_cache=False)
        else:
            whole = torch.cat([words, made[:, 1:]], 1)
            seen = torch.cat([mask, torch.ones_like(made[:, 1:])], 1)
            positions = (seen.cumsum(-1) - 1).clamp_min(0)
            output = model(input_ids=whole, attention_mask=seen, position_ids=positions, use_cache=False)
        found.append(output.logits[:, -1])
        made = torch.cat([made, found[-1].argmax(-1, keepdim=True)], 1)
    return torch.stack(found, 1)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """The same words, from the same logits."""
    assert torch.equal(actual.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def assert_moved(actual: Tensor, base: Tensor) -> None:
    assert (actual[:, 0] - base[:, 0]).abs().max() > 0.05 * base[:, 0].abs().max()


@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_cached_equals_uncached_token_by_token(name: str, implementation: str) -> None:
    base, model, given = adapted(name, implementation)
    expected = step_by_step(name, model, given)
    assert_same(logits(model, given), expected)
    assert_same(logits(model, given, use_cache=False), expected)
    assert_moved(expected, logits(base, given))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_every_kind_of_edit(name: str, method: str) -> None:
    base, model, given = adapted(name, "sdpa", method)
    expected = step_by_step(name, model, given)
    assert_same(logits(model, given), expected)
    assert_moved(expected, logits(base, given))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2", "t5"])
@pytest.mark.parametrize("padded", [True, False])
def test_static_cache(name: str, padded: bool, implementation: str) -> None:
    """A static cache has room for more keys than there are: without padding sdpa gets no mask for the prompt, and
    aligns its causality from the top left."""
    _, model, given = adapted(name, implementation)
    if not padded:
        given = {key: value[1:] for key, value in given.items()}
    static = logits(model, given, cache_implementation="static", disable_compile=True)
    assert_same(static, logits(model, given))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bart"])
def test_beams(name: str, implementation: str) -> None:
    _, model, given = adapted(name, implementation)
    cached = text(model, given, num_beams=3)
    assert torch.equal(cached, text(model, given, num_beams=3, use_cache=False))
    one = {key: value[1:] for key, value in given.items()}
    assert torch.equal(text(model, one, num_beams=3), cached[1:])  # rows and their beams stay apart


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_assisted_decoding(name: str, implementation: str) -> None:
    """The bare host drafts, the adapted one checks several tokens at once."""
    base, model, given = adapted(name, implementation)
    one = {key: value[1:] for key, value in given.items()}
    assert torch.equal(text(model, one, assistant_model=base), text(model, one))
    assert torch.equal(text(model, one, prompt_lookup_num_tokens=2), text(model, one))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_chunked_prefill(name: str, implementation: str) -> None:
    """The prompt in pieces: later pieces have a cache behind them and more than one query."""
    _, model, given = adapted(name, implementation)
    assert_same(logits(model, given, prefill_chunk_size=4), logits(model, given))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_equals_a_prefilled_cache(name: str, implementation: str) -> None:
    """The bare host with the prefix in its cache: outputs and gradients."""
    base = host(name, implementation)
    model = deepcopy(base)
    injection = peftcore.apply(model, METHODS["in_front"])
    given = inputs(name)
    valid, length = given["attention_mask"].bool(), 3
    positions = torch.arange(given["input_ids"].shape[1]).expand(2, -1)
    cache = DynamicCache()
    leaves = []
    for index, operator in enumerate(injection.operators.values()):
        pair = [each.detach().clone().requires_grad_() for each in (operator.key, operator.value)]
        cache.update(*(each.expand(2, -1, -1, -1) for each in pair), index)
        leaves += pair
    wide = torch.cat([torch.ones(2, length).long(), given["attention_mask"]], 1)
    expected = base(input_ids=given["input_ids"], attention_mask=wide, cache=cache, position_ids=positions).logits[
        valid
    ]
    ours = model(**given, position_ids=positions).logits[valid]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    mine = torch.autograd.grad(ours.square().sum(), list(injection.parameters()))
    theirs = torch.autograd.grad(expected.square().sum(), leaves)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


def test_the_cache_holds_words_only() -> None:
    """Keys in front are no part of the cache: it can be handed on, also to the bare host."""
    _, model, given = adapted("llama", "sdpa")
    cache = model(**given, use_cache=True).cache
    assert cache.get_seq_length() == given["input_ids"].shape[1]
