"""Rows of a route where something else is as long as the batch: tokens, heads, tables without rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.forward.choice.active_adapters import Route
from peftcore.forward.rows.routing import rows_seen, told_apart
from peftcore.testing.kit import fill

ROWS = 4


def route_of(rows: int, copies: int = 1) -> Route:
    return Route(("a",), torch.zeros(rows, dtype=torch.long), copies, (0,) * rows)


@pytest.mark.parametrize(
    ("others", "apart"),
    [
        ({}, True),
        ({"mask": torch.ones(1, 1, 5, 5)}, True),
        ({"memory": torch.ones(4, 7, 8)}, True),
        ({"memory": torch.ones(4, 7, 8), "mask": torch.ones(4, 1, 5, 5), "bias": torch.ones(4, 4, 5, 5)}, True),
        ({"slopes": torch.ones(4, 5, 5), "bias": torch.ones(4, 4, 5, 5)}, False),
        ({"mask": torch.ones(4, 4)}, False),
        ({"angles": (torch.ones(4, 6), torch.ones(4, 6))}, True),
        ({"angles": (torch.ones(4, 6), torch.ones(4, 6)), "mask": torch.ones(4, 1, 4, 4)}, False),
        ({"sinks": torch.ones(4), "bias": torch.ones(1, 4, 5, 5)}, False),
    ],
)
def test_what_is_as_long_as_the_batch_may_have_no_rows(others: dict[str, Any], apart: bool) -> None:
    x = torch.ones(4, 5, 8)
    assert told_apart(route_of(4), 4, x, others) is apart
    assert rows_seen(route_of(4), (x,), others) == (4 if apart else None)
    assert told_apart(route_of(2, copies=2), 4, x, others) is apart


def test_rows_of_as_many_tokens_are_not_told_from_a_mask() -> None:
    x = torch.ones(4, 4, 8)
    assert rows_seen(route_of(4), (x,), {}) == 4 and rows_seen(route_of(4), (x, x, x), {}) == 4
    assert rows_seen(route_of(4), (x,), {"attn_mask": torch.ones(4, 4)}) is None
    assert rows_seen(route_of(4), (x,), {"attn_mask": torch.ones(5, 5)}) == 4


class Masked(nn.Module):
    """torch's own layers, under a causal mask ``[tokens, tokens]``."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        self.embed, self.layers = nn.Embedding(20, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        found: Tensor = self.layers(self.embed(ids), mask=mask, is_causal=False)
        return found


@torch.no_grad()
@pytest.mark.parametrize("method", ["lora", "bitfit", "houlsby_adapter"])
@pytest.mark.parametrize("names", [["a", None, "b", "b"], ["a", "a", "b", "b"], ["b", None, None, None]])
def test_each_row_is_as_alone(method: str, names: list[str | None]) -> None:
    torch.manual_seed(0)
    model = Masked().eval()
    for number, name in enumerate("ab"):
        fill(peftcore.apply(model, method, name=name), number)
    ids = torch.randint(1, 20, (ROWS, ROWS))
    alone = []
    for row, name in zip(ids, names, strict=True):
        with peftcore.activate(model, *filter(None, [name])):
            alone.append(model(row[None]))
    with peftcore.route(model, names):
        torch.testing.assert_close(model(ids), torch.cat(alone), atol=1e-5, rtol=1e-4)
