"""Masks over a sequence that gets rows in front: the final ones get columns and rows of their own."""

from __future__ import annotations

import pytest
import torch
from sequence_toys import LENGTH, adapt, by_hand, close, host, tokens
from torch import Tensor


def final_mask(kind: torch.dtype, window: int | None = None, count: int = 6) -> Tensor:
    """Causal, and the second of the batch does not see its third token."""
    seen = torch.ones(count, count, dtype=torch.bool).tril()
    if window is not None:
        seen &= ~torch.ones_like(seen).tril(-window)
    seen = seen.expand(2, 1, count, count).clone()
    seen[1, :, 3:, 2] = False
    return seen if kind == torch.bool else torch.zeros(seen.shape, dtype=kind).masked_fill(~seen, -1e300)


@pytest.mark.parametrize("kind", [torch.bool, torch.float64])
@pytest.mark.parametrize("name", ["llama", "short_mistral"])
def test_final_masks_get_columns_and_rows(name: str, kind: torch.dtype) -> None:
    model, _ = host(name)
    base, _, rows = adapt(model)
    window = 5 if name == "short_mistral" else None
    whole = final_mask(kind, window, 6 + LENGTH)
    whole[1, :, :, 2] = final_mask(kind, window, 6 + LENGTH)[0, :, :, 2]
    whole[1, :, LENGTH + 3 :, LENGTH + 2] = False if kind == torch.bool else -1e300
    output = model(input_ids=tokens(), attention_mask=final_mask(kind, window)).logits
    close(output, by_hand(base, rows, tokens(), attention_mask=whole))


def test_final_masks_by_kind_of_layer() -> None:
    """The window ends on the rows, also where the host said "all that is causal" because without them it would not."""
    model, _ = host("hybrid")
    base, _, rows = adapt(model)
    ids = tokens()
    expected = by_hand(base, rows, ids)
    near = by_hand(base, rows, ids, attention_mask={"full_attention": None, "sliding_attention": None})
    assert (expected - near).abs().max() > 1e-6
    for sliding in (None, final_mask(torch.bool)):
        masks = {"full_attention": None, "sliding_attention": sliding}
        if sliding is not None:
            masks["sliding_attention"] = torch.ones_like(sliding).tril()
        close(model(input_ids=ids, attention_mask=masks).logits, expected)
