"""Rows that go to different injections, where the model fills a cache: each as alone, also where it goes on from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from history_world import case_of
from torch import Tensor, nn
from transformers import DynamicCache

import peftcore
from peftcore import Average
from peftcore.errors import PeftcoreError, TargetError, UnsupportedSite
from peftcore.testing import HOSTS
from peftcore.testing.kit import fill

METHODS = [info.name for info in peftcore.methods() if info.per_row and not info.needs_data]


def adapted(name: str) -> nn.Module:
    """A llama with two injections of a method, their tensors filled."""
    torch.manual_seed(0)
    model, _ = HOSTS["llama"].build()
    model.config.use_cache = True
    case = case_of(name, "llama")
    for number in (1, 2):
        injection = peftcore.apply(model, name, name=f"a{number}", **case.options)
        with torch.no_grad():
            for parameter in injection.parameters():
                parameter.normal_(0, 0.1)
    return model.eval()


def logits(model: nn.Module, pieces: list[Tensor]) -> Tensor:
    """Those of all pieces, each of which goes on from the cache of the one before."""
    found, cache = [], DynamicCache()  # which makes its layers as the model comes to them
    with torch.no_grad():
        for piece in pieces:
            output = model(piece, past_key_values=cache, use_cache=True)
            found.append(output.logits)
            cache = output.past_key_values
    return torch.cat(found, 1)


@pytest.mark.share(3)
@pytest.mark.parametrize("name", METHODS)
def test_each_row_is_as_alone(name: str) -> None:
    try:
        model = adapted(name)
    except (TargetError, UnsupportedSite) as error:
        pytest.skip(f"no place: {error}")
    pieces = [torch.randint(3, 30, (3, 6)), torch.randint(3, 30, (3, 1))]
    names: list[str | None] = ["a2", "a1", None]

    def alone(row: int, chosen: str | None) -> Tensor:
        with peftcore.activate(model, *filter(None, [chosen])):
            return logits(model, [piece[row : row + 1] for piece in pieces])

    try:
        expected = torch.cat([alone(row, chosen) for row, chosen in enumerate(names)])
    except PeftcoreError as error:
        pytest.skip(f"it does not go on from a cache: {error}")
    with peftcore.route(model, names):
        torch.testing.assert_close(logits(model, pieces), expected, atol=2e-5, rtol=1e-4)


SMALL = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
BLOCKS: dict[str, Any] = {
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 40},  # by position
    "Bloom": SMALL,  # by a name of their own
    "Falcon": {**SMALL, "alibi": False},
    "GPTNeo": {
        "vocab_size": 40,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
    },
}
"""Models whose blocks are given the cache in other ways than most."""


def small(kind: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**BLOCKS[kind], bos_token_id=0, eos_token_id=1)
    name = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    model: nn.Module = getattr(transformers, name)(config)
    return model.eval()


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("name", ["loreft", "k_adapter"])
def test_blocks_may_be_given_the_cache_under_any_name_or_by_position(kind: str, name: str) -> None:
    model = small(kind)
    for number in (1, 2):
        fill(peftcore.apply(model, name, name=f"a{number}"), number)
    pieces = [torch.randint(3, 30, (3, 6)), torch.randint(3, 30, (3, 1))]
    expected = []
    for row, chosen in enumerate(["a2", "a1", None]):
        with torch.no_grad(), peftcore.activate(model, *filter(None, [chosen])), peftcore.call(model, prompt_length=6):
            expected.append(model(torch.cat(pieces, 1)[row : row + 1], use_cache=False).logits)
    for prompt_length in ({}, {"prompt_length": 6}):
        with peftcore.route(model, ["a2", "a1", None]), peftcore.call(model, **prompt_length):
            torch.testing.assert_close(logits(model, pieces), torch.cat(expected), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["loreft", "lora"])
def test_branches_of_a_composition_see_the_cache_as_it_was(name: str) -> None:
    model = adapted(name)
    pieces: Any = [torch.randint(3, 30, (3, 6)), torch.randint(3, 30, (3, 1))]
    with peftcore.activate(model, Average("a1", "a2")):
        together = logits(model, [torch.cat(pieces, 1)])
        torch.testing.assert_close(logits(model, pieces), together, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["apt", "k_adapter", "lst", "pal", "tiny_attention_adapter", "shadow"])
def test_beams_reorder_what_operators_keep_of_rows_in_the_cache(name: str, cache: str) -> None:
    """The cache has it of all rows, also where an operator is given those of its own injection alone."""
    model: Any = adapted(name)
    ids, names = torch.randint(3, 30, (3, 5)), ["a2", None, "a1"]
    way = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    way |= {"use_cache": True, "return_dict_in_generate": True, "output_logits": True}
    way |= {"cache_implementation": "static"} if cache == "static" else {}

    def alone(row: int, chosen: str | None) -> Tensor:
        with peftcore.activate(model, *filter(None, [chosen])):
            return torch.stack(model.generate(ids[row : row + 1], **way).logits, 1)

    expected = torch.cat([alone(row, chosen) for row, chosen in enumerate(names)])
    with peftcore.route(model, names, copies=2):
        found = torch.stack(model.generate(ids, **way).logits, 1)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert (expected[:2] - expected[4:]).abs().max() > 1e-3
