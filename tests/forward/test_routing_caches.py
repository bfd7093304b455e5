"""Rows that go to different injections, where the model fills a cache: each as alone, also where it goes on from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from history_world import case_of
from torch import Tensor, nn
from transformers import DynamicCache

import peftcore
from peftcore import Average
from peftcore.errors import PeftcoreError, TargetError, UnsupportedSite
from peftcore.testing import HOSTS

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


@pytest.mark.parametrize("name", ["loreft", "lora"])
def test_branches_of_a_composition_see_the_cache_as_it_was(name: str) -> None:
    model = adapted(name)
    pieces: Any = [torch.randint(3, 30, (3, 6)), torch.randint(3, 30, (3, 1))]
    with peftcore.activate(model, Average("a1", "a2")):
        together = logits(model, [torch.cat(pieces, 1)])
        torch.testing.assert_close(logits(model, pieces), together, atol=2e-5, rtol=1e-4)
