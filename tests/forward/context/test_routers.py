"""Gates of routers by row and token: layouts, padding, caches, encoders and decoders; sums against plain loops."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from peftcore.forward.context import context
from peftcore.forward.context.context import ForwardContext
from peftcore.forward.context.routers import Ledger, by_row, of_rows
from peftcore.testing import HOSTS

MASK = torch.tensor([[0, 1, 1], [1, 1, 1]])


@pytest.fixture
def within(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run under the context of a host's forward with these inputs."""

    def begin(host: str = "llama", **inputs: Any) -> None:
        model, _ = HOSTS[host].build()
        monkeypatch.setattr(context.HERE, "calls", [ForwardContext(None, None, model, (), inputs)])

    return begin


def numbered(*shape: int) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float64).view(shape)


def test_tokens_have_the_rows_of_the_mask(within: Any) -> None:
    within(input_ids=MASK, attention_mask=MASK)
    gates = numbered(2, 3, 5)
    for given in (gates, gates.flatten(0, 1)):
        shares, counts, known = by_row(given)
        assert torch.equal(shares, gates) and known and counts is not None and torch.equal(counts, MASK != 0)


def test_a_token_may_choose_several_times(within: Any) -> None:
    within(input_ids=MASK, attention_mask=MASK)
    shares, counts, known = by_row(numbered(2, 3, 4, 5), inner=1)
    assert known and shares.shape == (2, 12, 5) and torch.equal(shares[1, 5], numbered(2, 3, 4, 5)[1, 1, 1])
    assert counts is not None and torch.equal(counts, (MASK != 0).repeat_interleave(4, 1))
    flat = by_row(numbered(6, 4, 5), inner=1)
    assert torch.equal(flat.shares, shares) and flat.counts is not None and torch.equal(flat.counts, counts)


def test_with_a_cache_the_last_columns_are_this_forwards(within: Any) -> None:
    within(input_ids=MASK[:, 1:], attention_mask=MASK)
    counts = by_row(numbered(2, 2, 5)).counts
    assert counts is not None and torch.equal(counts, MASK[:, 1:] != 0)


def test_what_stands_beside_the_tokens_has_no_padding_of_theirs(within: Any) -> None:
    """A tower for pictures has fewer tokens than a text here, and the text's last ones are padding."""
    for text in ({"input_ids": MASK}, {"inputs_embeds": numbered(2, 3, 4)}):
        within(**text, attention_mask=MASK.flip(1))
        assert by_row(numbered(2, 2, 5))[1:] == (None, False)


def test_one_vector_a_row_is_no_padding(within: Any) -> None:
    within(input_ids=MASK, attention_mask=MASK)
    shares, counts, known = by_row(numbered(2, 5))
    assert shares.shape == (2, 1, 5) and counts is None and known


def test_what_nothing_tells_is_unknown(within: Any) -> None:
    gates = numbered(2, 3, 5)
    assert by_row(gates)[1:] == (None, False)  # no forward of a host
    within(input_ids=MASK)
    assert by_row(gates)[1:] == (None, True)  # nobody tells of padding
    within(input_ids=MASK, attention_mask=torch.ones(2, 1, 3, 3))
    assert by_row(gates)[1:] == (None, False)
    within(input_ids=MASK, attention_mask=MASK)
    assert by_row(numbered(4, 3, 5))[1:] == (None, False)  # other rows
    assert by_row(numbered(7, 5))[1:] == (None, False)  # chosen tokens
    assert by_row(numbered(5))[2] is False


def test_pictures_are_rows_of_places(within: Any) -> None:
    within("vit", pixel_values=torch.zeros(2, 3, 4, 4))
    shares, counts, known = by_row(numbered(2, 4, 3, 5))
    assert shares.shape == (2, 12, 5) and counts is None and known


def test_encoder_and_decoder_have_masks_of_their_own(within: Any) -> None:
    ids = torch.ones(2, 4, dtype=torch.long)
    other = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    within("t5", input_ids=MASK, attention_mask=MASK, decoder_input_ids=ids, decoder_attention_mask=other)
    found = by_row(numbered(2, 3, 5)).counts
    assert found is not None and torch.equal(found, MASK != 0)
    found = by_row(numbered(2, 4, 5)).counts
    assert found is not None and torch.equal(found, other != 0)
    within("t5", input_ids=MASK, attention_mask=MASK, labels=ids)
    assert by_row(numbered(2, 4, 5))[1:] == (None, True)
    within("t5", input_ids=MASK, attention_mask=MASK, labels=MASK)
    assert by_row(numbered(2, 3, 5))[1:] == (None, False)  # either could be meant


def test_sums_are_those_of_plain_loops() -> None:
    """Gates of several sizes and signs, one choice dropped, one of padding; two forwards."""
    torch.manual_seed(0)
    gates = torch.randn(2, 4, 3)
    gates[0, 1] = 0
    gates[1, 2, 0] = 0
    counts = torch.ones(2, 4, dtype=torch.bool)
    counts[1, 3] = False
    ledger = Ledger()
    for _ in range(2):
        ledger.add(of_rows(gates)._replace(counts=counts))
    shares, loads, entropy, dropped, made, padding = [0.0] * 3, [0] * 3, 0.0, 0, 0, 0
    for row in range(2):
        for token in range(4):
            if not counts[row, token]:
                padding += 1
                continue
            made += 1
            sizes = [abs(float(each)) for each in gates[row, token]]
            dropped += sum(sizes) == 0
            for expert, size in enumerate(sizes):
                p = size / sum(sizes) if sum(sizes) else 0.0
                shares[expert] += p
                loads[expert] += size > 0
                entropy -= p * math.log(p) / math.log(3) if p else 0.0
    expected = [2 * each for each in (*shares, *loads, entropy, dropped, made, padding)]
    torch.testing.assert_close(torch.tensor(ledger.sums), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert ledger.forwards == 2 and (dropped, made, padding) == (1, 7, 1)
