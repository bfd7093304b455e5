"""Textual inversion beside peft's trainable tokens, which compute the same, and what the paper adds: an encoder that
gets new words, their start, and the rows that must stay as they are."""

from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from peft_pairs import ADAPTER, Both, Pair, difference
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

import peftcore
from peftcore.errors import UnsupportedSite
from peftcore.testing import against, conformance
from peftcore.testing.hosts import HOSTS

WORDS = {"tokens": list(range(3, 40))}  # a random batch need not have the last word


OPTIONS = {"dit": {"tokens": [1, 2]}, "task": {"tokens": list(range(128))}} | dict.fromkeys(
    ("llama", "bert", "t5", "gpt2", "moe", "mistral"), WORDS
)
FAILURES = {
    "a_host_without_memory_can_be_planned-t5": "moved to the meta device, the host has no ties any more: two tables"
}


@conformance("textual_inversion", options=OPTIONS, expected_failures=FAILURES)
def test_conformance(check: Callable[[], None]) -> None:
    check()


IDS = torch.tensor([[3, 38, 7, 39, 38], [4, 5, 39, 39, 8]])


def encoder(vocabulary: int = 40) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        initializer_range=0.3,
        eos_token_id=2,
    )
    return CLIPTextModel(config).eval()


def pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    layer: Any = theirs.get_submodule(site.module_path)
    tied = layer._tied_adapter  # the head's layer refers to that of the table
    deltas = (tied[0] if tied else layer).trainable_tokens_delta
    yield Pair(f"{site.path}.vectors", operator.vectors, deltas[ADAPTER], lambda t: t)


HOST_NAMES = {"bert": "word_embeddings", "llama": "embed_tokens", "gpt2": "wte"}


@pytest.mark.parametrize(("name", "table"), HOST_NAMES.items())
@against("peft 0.21", "textual_inversion")
def test_outputs_gradients_and_merged_weights_are_those_of_peft(name: str, table: str) -> None:
    """Also where the table is the head too (GPT-2)."""
    base, inputs = HOSTS[name].build()
    inputs = {**inputs, "input_ids": IDS}
    config = peft.TrainableTokensConfig(target_modules=[table], token_indices=[38, 39])
    both = Both(base.eval(), "textual_inversion", {"tokens": [38, -1]}, config, pairs)
    assert sum(p.numel() for p in both.injection.parameters()) == 2 * 16
    both.assert_same(lambda adapted: HOSTS[name].output(adapted(**inputs)))


def test_a_text_encoder_learns_a_word_that_its_tokenizer_got() -> None:
    """Added at the end of the table; gradients reach its vectors alone, and its rows are no part of the base."""
    model = encoder(38)
    before = model(IDS[:, :1]).last_hidden_state
    model.resize_token_embeddings(40)
    injection = peftcore.apply(model, "textual_inversion", tokens=[-2, -1], initializer=5)
    (operator,) = injection.operators.values()
    table = model.get_input_embeddings().weight
    expected = table[5].expand(2, -1)
    assert torch.equal(operator.vectors, expected)
    assert torch.equal(model(IDS).last_hidden_state, model(torch.where(IDS > 37, 5, IDS)).last_hidden_state)
    model(IDS).last_hidden_state.square().sum().backward()
    assert all(operator.vectors.grad.abs().amax(1) > 0)
    assert table.grad is None
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 16
    torch.testing.assert_close(model(IDS[:, :1]).last_hidden_state, before)


def test_merging_writes_the_rows_and_no_others() -> None:
    model = encoder()
    table = model.get_input_embeddings().weight
    before = table.detach().clone()
    injection = peftcore.apply(model, "textual_inversion", tokens=[38, 39])
    nn.init.normal_(injection.operators[injection.sites[0].path].vectors)
    expected = model(IDS).last_hidden_state
    vectors = next(iter(injection.operators.values())).vectors.detach().clone()
    injection.bake()
    assert difference(model(IDS).last_hidden_state, expected) <= 1e-6
    now = model.get_input_embeddings().weight
    assert torch.equal(now[38:], vectors) and torch.equal(now[:38], before[:38]) and torch.equal(table, before)


def test_weight_decay_reaches_the_vectors_alone() -> None:
    """The script of diffusers decays the whole table and then writes the other rows back."""
    model = encoder()
    table = model.get_input_embeddings().weight.detach().clone()
    injection = peftcore.apply(model, "textual_inversion", tokens=[39])
    optimizer = injection.optimizer(torch.optim.AdamW, lr=0.1, weight_decay=0.5)
    model(IDS).last_hidden_state.square().sum().backward()
    optimizer.step()
    assert torch.equal(model.get_input_embeddings().weight, table)
    (vectors,) = injection.parameters()
    assert difference(vectors, table[39:]) > 0.01


def test_tables_that_share_a_tensor_share_the_vectors() -> None:
    """T5's store of the table is never called; its encoder, its decoder and its head are."""
    model, inputs = HOSTS["t5"].build()
    model.eval()
    injection = peftcore.apply(model, "textual_inversion", tokens=[5, 6, 7])
    (vectors,) = injection.parameters()
    nn.init.normal_(vectors)
    expected = model(**inputs).logits
    injection.merge()
    assert difference(model(**inputs).logits, expected) <= 1e-5
    assert torch.equal(model.shared.weight[5:8], vectors)


@pytest.mark.parametrize("tokens", [[40], [-41], [3, 3], [39, -1]], ids=str)
def test_ids_that_the_table_has_not_or_twice_are_refused(tokens: list[int]) -> None:
    model = encoder()
    for verb in (peftcore.plan, peftcore.apply):
        with pytest.raises(UnsupportedSite, match=r"resize the table first|a token twice"):
            verb(model, "textual_inversion", tokens=tokens)


def test_positions_are_no_tokens() -> None:
    paths = list(peftcore.apply(encoder(), "textual_inversion").operators)
    assert len(paths) == 1
    assert paths[0].endswith("token_embedding")


def test_gradient_is_that_of_the_equation() -> None:
    """A row of the table that trains by itself, in float64."""
    model, reference = encoder().double(), encoder().double()
    reference.load_state_dict(model.state_dict())
    reference.requires_grad_(False)
    (vectors,) = peftcore.apply(model, "textual_inversion", tokens=[39, 38], dtype="float64").parameters()
    nn.init.normal_(vectors)
    rows: Tensor = vectors.detach().clone().requires_grad_()
    table = reference.get_input_embeddings()
    whole = torch.cat([table.weight[:38], rows[1:], rows[:1]])
    embedded = nn.functional.embedding(IDS, whole)
    table.register_forward_hook(lambda *_: embedded)
    ours, expected = model(IDS).last_hidden_state, reference(IDS).last_hidden_state
    torch.testing.assert_close(ours, expected)
    direction = torch.randn_like(ours)
    for output in (ours, expected):
        (output * direction).sum().backward()
    torch.testing.assert_close(vectors.grad, rows.grad)
