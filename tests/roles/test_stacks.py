"""The stacks of hosts: who takes token ids, where embeddings enter, where blocks end, who reads whom."""

from __future__ import annotations

import pytest
import torch
from host_zoo import SURVEY, build
from torch import nn

import peftcore
from peftcore.errors import SequenceError
from peftcore.roles import derive
from peftcore.roles.stacks import TokenStack, find

torch.set_num_threads(1)


def stacks_of(model: nn.Module) -> dict[str, TokenStack]:
    return {stack.path: stack for stack in find(dict(model.named_modules()), derive(model).entries)}


# (path, where embeddings enter, where blocks end, token table), written down by hand.
PLACES: dict[str, tuple[str, str, str, str]] = {
    "llama": ("model", "model", "model", "embed_tokens"),
    "gpt2": ("transformer", "transformer", "transformer", "wte"),
    "gpt_neox": ("gpt_neox", "gpt_neox", "gpt_neox", "embed_in"),
    "opt": ("model.decoder", "model.decoder", "model.decoder", "embed_tokens"),
    "mamba": ("backbone", "backbone", "backbone", "embeddings"),
    "bert": ("bert", "bert", "bert.encoder", "embeddings.word_embeddings"),
    "distilbert": ("distilbert", "distilbert", "distilbert.transformer", "embeddings.word_embeddings"),
    "albert": ("albert", "albert", "albert.encoder", "embeddings.word_embeddings"),
    "modernbert": ("model", "model", "model", "embeddings.tok_embeddings"),
    "whisper": ("model.decoder", "model.decoder", "model.decoder", "embed_tokens"),
    "clip": ("text_model", "text_model.embeddings", "text_model.encoder", "embeddings.token_embedding"),
    "siglip": ("text_model", "text_model.embeddings", "text_model.encoder", "embeddings.token_embedding"),
    "llava": ("model.language_model", "model.language_model", "model.language_model", "embed_tokens"),
    "qwen2_vl": ("model.language_model", "model.language_model", "model.language_model", "embed_tokens"),
    "gemma3": ("model.language_model", "model.language_model", "model.language_model", "embed_tokens"),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_host_with_one_stack(name: str) -> None:
    (stack,) = stacks_of(build(name)[0]).values()
    assert (stack.path, stack.entry, stack.body, stack.table) == PLACES[name]
    assert stack.readers == () and not stack.reads


@pytest.mark.parametrize(("name", "above"), [("t5", ""), ("mt5", ""), ("bart", "model."), ("mbart", "model.")])
def test_decoders_read_encoders(name: str, above: str) -> None:
    stacks = stacks_of(build(name)[0])
    encoder, decoder = stacks[f"{above}encoder"], stacks[f"{above}decoder"]
    assert len(stacks) == 2
    assert encoder.readers == (f"{above}decoder",) and not encoder.reads and not encoder.causal
    assert decoder.readers == () and decoder.reads and decoder.causal
    assert encoder.table == decoder.table == "embed_tokens"


def test_roles_of_stacks() -> None:
    host = derive(build("t5")[0])
    assert [entry.path for entry, _ in host.select("stack")] == ["encoder"]
    assert [entry.path for entry, _ in host.select("stack.decoder")] == ["decoder"]
    assert [entry.tensor for entry, _ in host.select("stack.*")] == ["embed_tokens.weight"] * 2


@pytest.mark.parametrize(
    ("name", "causal"),
    [("llama", True), ("bloom", True), ("mpt", True), ("bert", False), ("bert_decoder", True), ("modernbert", False)],
)
def test_causality_is_told_from_the_blocks(name: str, causal: bool) -> None:
    (stack,) = stacks_of(build(name)[0]).values()
    assert stack.causal is causal


def test_positions_that_count_tokens_are_told_from_the_padding_of_their_table() -> None:
    assert [stack.position_padding for stack in stacks_of(build("roberta")[0]).values()] == [0]
    assert [stack.position_padding for stack in stacks_of(build("bert")[0]).values()] == [None]


def test_a_stack_that_is_the_host_itself() -> None:
    model = build("llama")[0].model
    (stack,) = stacks_of(model).values()
    assert (stack.path, stack.entry, stack.body, stack.table) == ("", "", "", "embed_tokens")
    (stack,) = stacks_of(build("bert")[0].bert).values()
    assert (stack.path, stack.entry, stack.body) == ("", "", "encoder")


def test_a_table_shared_by_several_stacks_belongs_to_each() -> None:
    """Resizing puts one and the same module into the encoder and the decoder."""
    model = build("t5")[0]
    model.resize_token_embeddings(120)
    assert {path: stack.table for path, stack in stacks_of(model).items()} == {
        "encoder": "embed_tokens",
        "decoder": "embed_tokens",
    }


@pytest.mark.parametrize("name", [name for name in SURVEY if name.startswith(("timm", "vit", "swin", "sam", "detr"))])
def test_hosts_without_tokens_have_no_stack(name: str) -> None:
    assert stacks_of(build(name)[0]) == {}


class Tokens(nn.Module):
    """A block list behind a table, with arguments of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(9, 8)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2))


class IdsOnly(Tokens):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.word_embeddings(input_ids)
        return hidden


class MoreThanEmbeddings(Tokens):
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        per_layer_inputs: torch.Tensor | None = None,
    ) -> None:
        """Looks ids up in further tables, one a layer."""


class Plain(Tokens):
    def forward(self, input_ids: torch.Tensor | None = None, inputs_embeds: torch.Tensor | None = None) -> None:
        """Takes embeddings in the place of ids."""


def test_a_stack_must_take_embeddings_that_say_all_that_ids_say() -> None:
    assert list(stacks_of(Plain())) == [""]
    assert stacks_of(IdsOnly()) == {}
    assert stacks_of(MoreThanEmbeddings()) == {}


@pytest.mark.parametrize(("name", "takes"), [("llama", True), ("mamba", True), ("clip", False)])
def test_which_stacks_go_on_from_what_earlier_tokens_left(name: str, takes: bool) -> None:
    (stack,) = stacks_of(build(name)[0]).values()
    assert stack.takes_cache is takes


def test_the_cache_among_the_arguments_of_a_module() -> None:
    cache = object()
    assert peftcore.author.cache_in({"hidden_states": 1, "past_key_values": cache, "cache_params": None}) is cache
    assert peftcore.author.cache_in({"hidden_states": 1, "past_key_values": None}) is None
    from transformers import DynamicCache

    own = DynamicCache()
    assert peftcore.author.cache_in({"hidden_states": 1, "whatever_its_name": own}) is own, (
        "a block may name it as it likes"
    )


def test_what_is_in_front_and_the_text_are_no_more_than_the_positions() -> None:
    """Places tell more than counts: padding has none."""
    stack = TokenStack("text", "text", "text", "table", positions=8)
    stack.check_positions(3, 5, None)
    stack.check_positions(3, 9, torch.tensor([[0, 0, 7]]))
    with pytest.raises(SequenceError, match="text has 8 positions, but 3 keys in front of a text of 6 tokens need 9"):
        stack.check_positions(3, 6, None, "keys")
    counts = TokenStack("", "", "", "table", positions=8, position_padding=1)  # from 2 on
    counts.check_positions(3, 3, None)
    with pytest.raises(SequenceError, match="the host has 6 positions, but 3 rows in front of a text of 4 tokens need"):
        counts.check_positions(3, 9, torch.tensor([[1, 8]]))
    TokenStack("", "", "", "table").check_positions(3, 1000, None)
