"""One forward with rows in front: every kind of host against itself, run by hand on embeddings that begin with the
rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sequence_toys import LENGTH, adapt, host, in_front, ones_in_front, padded, tokens
from torch import Tensor, nn

DECODERS = [
    "llama",
    "mistral",
    "qwen2",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt_neox",
    "falcon_old",
    "falcon_new",
    "bloom",
    "opt",
    "mpt",
    "deepseek_v3",
    "mamba",
    "mamba2",
    "jamba",
    "zamba",
    "gpt2",
    "gpt_neo",
    "gptj",
    "qwen3_moe",
    "mixtral",
    "bert_decoder",
]
ENCODERS = ["bert", "distilbert", "albert", "electra", "deberta_v2", "modernbert"]


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def same_gradients(ours: Tensor, expected: Tensor, rows: Tensor, by_hand: Tensor) -> None:
    """Both outputs, and the gradients of the rows through them, agree, and none of this is trivial."""
    close(ours, expected)
    direction = torch.randn_like(ours)
    (mine,) = torch.autograd.grad((ours * direction).sum(), rows, retain_graph=True)
    (other,) = torch.autograd.grad((expected * direction).sum(), by_hand, retain_graph=True)
    assert other.abs().max() > 1e-6
    torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-8)


def hand(rows: Tensor) -> Tensor:
    return rows.detach().clone().requires_grad_()


@pytest.mark.parametrize("name", DECODERS)
def test_decoders(name: str) -> None:
    model, _ = host(name)
    base, injection, rows = adapt(model)
    ids, by_hand = tokens(), hand(rows)
    mask = padded(torch.ones_like(ids), right=2)
    embeds = in_front(by_hand, base.get_input_embeddings()(ids))
    output = model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
    expected = base(
        inputs_embeds=embeds, attention_mask=ones_in_front(mask), use_cache=False, output_hidden_states=True
    )
    alone = base(input_ids=ids, attention_mask=mask, use_cache=False)
    assert output.logits.shape == alone.logits.shape
    assert (output.logits - alone.logits).abs().max() > 1e-3
    same_gradients(output.logits, expected.logits[:, LENGTH:], rows, by_hand)
    assert len(output.hidden_states) == len(expected.hidden_states)
    for ours, other in zip(output.hidden_states, expected.hidden_states, strict=True):
        close(ours, other[:, LENGTH:])
    with injection.disabled():
        assert torch.equal(model(input_ids=ids, attention_mask=mask, use_cache=False).logits, alone.logits)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name: str) -> None:
    model, inputs = host(name)
    base, _, rows = adapt(model)
    ids, by_hand = inputs["input_ids"], hand(rows)
    mask = padded(torch.ones_like(ids), right=4)
    embeds = in_front(by_hand, base.get_input_embeddings()(ids))
    output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    expected = base(inputs_embeds=embeds, attention_mask=ones_in_front(mask), output_hidden_states=True)
    same_gradients(output.logits, expected.logits[:, LENGTH:], rows, by_hand)
    for ours, other in zip(output.hidden_states, expected.hidden_states, strict=True):
        close(ours, other[:, LENGTH:])


def test_a_pooler_reads_the_first_token_and_not_the_first_row() -> None:
    model, inputs = host("bert_cls")
    base, _, rows = adapt(model)
    ids, by_hand = inputs["input_ids"], hand(rows)
    mask = padded(torch.ones_like(ids), right=4)
    kinds = torch.randint(2, ids.shape)
    kinds_in_front = torch.cat([torch.zeros(2, LENGTH, dtype=torch.long), kinds], dim=1)
    embeds = in_front(by_hand, base.get_input_embeddings()(ids))
    hidden = base.bert(
        inputs_embeds=embeds, attention_mask=ones_in_front(mask), token_type_ids=kinds_in_front
    ).last_hidden_state
    expected = base.classifier(base.bert.pooler(hidden[:, LENGTH:]))
    output = model(input_ids=ids, attention_mask=mask, token_type_ids=kinds)
    same_gradients(output.logits, expected, rows, by_hand)
    inner = model.bert(input_ids=ids, attention_mask=mask, token_type_ids=kinds)
    close(inner.last_hidden_state, hidden[:, LENGTH:])


@pytest.mark.parametrize("padding", [{"left": 0}, {"left": 3}, {"right": 3}])
def test_positions_that_count_tokens_begin_behind_the_rows(padding: dict[str, int]) -> None:
    """RoBERTa: padding has position 0 here, tokens count from 1 on, the rows first."""
    model, inputs = host("roberta")
    base, _, rows = adapt(model)
    by_hand = hand(rows)
    mask = padded(torch.ones_like(inputs["input_ids"]), **padding)
    ids = inputs["input_ids"].masked_fill(mask == 0, 0)
    places = torch.cat([torch.arange(1, LENGTH + 1).expand(2, -1), (mask.cumsum(1) + LENGTH) * mask], dim=1)
    embeds = in_front(by_hand, base.get_input_embeddings()(ids))
    expected = base(inputs_embeds=embeds, attention_mask=ones_in_front(mask), position_ids=places)
    output = model(input_ids=ids, attention_mask=mask)
    seen = mask.bool()
    same_gradients(output.logits[seen], expected.logits[:, LENGTH:][seen], rows, by_hand)


@pytest.mark.parametrize("name", ["t5", "mt5", "bart", "mbart"])
@pytest.mark.parametrize("right", [0, 4])
def test_encoder_decoders(name: str, right: int) -> None:
    """The decoder attends to the rows, whether it gets a mask or not."""
    model, inputs = host(name)
    base, _, rows = adapt(model)
    ids, answer, by_hand = inputs["input_ids"], inputs["decoder_input_ids"], hand(rows)
    mask = padded(torch.ones_like(ids), right=right) if right else None
    encoder = base.get_encoder()
    embeds = in_front(by_hand, encoder.embed_tokens(ids))
    whole = None if mask is None else ones_in_front(mask)
    encoded = encoder(inputs_embeds=embeds, attention_mask=whole)
    expected = base(encoder_outputs=encoded, attention_mask=whole, decoder_input_ids=answer)
    output = model(input_ids=ids, attention_mask=mask, decoder_input_ids=answer)
    same_gradients(output.logits, expected.logits, rows, by_hand)
    assert output.encoder_last_hidden_state.shape[1] == LENGTH + ids.shape[1]


@pytest.mark.parametrize(("name", "target"), [("t5", "decoder"), ("bart", "model.decoder"), ("whisper", None)])
def test_rows_in_a_decoder_that_reads(name: str, target: str | None) -> None:
    model, inputs = host(name)
    model.set_attn_implementation("eager")  # the one that gives attention weights back
    base, injection, rows = adapt(model, **({"target": target} if target else {}))
    assert [site.module_path.rpartition(".")[2] for site in injection.sites] == ["decoder"]
    given, by_hand = dict(inputs), hand(rows)
    answer = given.pop("decoder_input_ids")
    embeds = in_front(by_hand, base.get_decoder().embed_tokens(answer))
    output = model(**given, decoder_input_ids=answer, output_attentions=True)
    expected = base(**given, decoder_inputs_embeds=embeds)
    same_gradients(output.logits, expected.logits[:, LENGTH:], rows, by_hand)
    assert output.decoder_attentions[0].shape[2:] == (answer.shape[1], LENGTH + answer.shape[1])
    assert output.cross_attentions[0].shape[2] == answer.shape[1]


def test_an_encoder_alone_gives_back_what_the_host_would() -> None:
    import transformers

    full, inputs = host("t5")
    model = transformers.T5EncoderModel(full.config).double().eval()
    model.encoder.load_state_dict(full.encoder.state_dict())
    base, _, rows = adapt(model)
    ids = inputs["input_ids"]
    expected = base(inputs_embeds=in_front(rows, base.encoder.embed_tokens(ids))).last_hidden_state
    close(model(input_ids=ids).last_hidden_state, expected[:, LENGTH:])


@pytest.mark.parametrize("end", [2, 98])
@pytest.mark.parametrize("through", ["get_text_features", "forward"])
def test_clip_text(through: str, end: int) -> None:
    """The tower pools at the place of the end token, told from the ids: the largest one (in old configurations, which
    say 2), or the one that the configuration names."""
    model, inputs = host("clip")
    base, _, rows = adapt(model)
    ids, by_hand = inputs["input_ids"], hand(rows)
    ids[0, 4], ids[1, -1] = 98, 98
    model.text_model.eos_token_id = end
    tower, length = base.text_model, LENGTH + ids.shape[1]
    hidden = tower.embeddings(inputs_embeds=in_front(by_hand, tower.embeddings.token_embedding(ids)))
    causal = torch.full((1, 1, length, length), -1e300, dtype=torch.float64).triu(1)
    hidden = tower.final_layer_norm(tower.encoder(inputs_embeds=hidden, attention_mask=causal).last_hidden_state)
    pooled = hidden[torch.arange(2), LENGTH + torch.tensor([4, ids.shape[1] - 1])]
    expected = base.text_projection(pooled)
    if through == "forward":
        expected = expected / expected.norm(dim=-1, keepdim=True)
        ours = model(**{**inputs, "input_ids": ids}).text_embeds
    else:
        ours = model.get_text_features(ids).pooler_output
    same_gradients(ours, expected, rows, by_hand)
    mask = torch.ones_like(ids)
    close(model.text_model(ids, attention_mask=mask).last_hidden_state, hidden[:, LENGTH:])
    states = model.text_model(ids, output_hidden_states=True).hidden_states
    assert {state.shape[1] for state in states} == {ids.shape[1]}


def test_siglip_text() -> None:
    model, inputs = host("siglip")
    base, _, rows = adapt(model)
    ids, tower = inputs["input_ids"], base.text_model
    hidden = tower.embeddings(inputs_embeds=in_front(rows, tower.embeddings.token_embedding(ids)))
    hidden = tower.final_layer_norm(tower.encoder(inputs_embeds=hidden).last_hidden_state)
    close(model.get_text_features(ids).pooler_output, tower.head(hidden[:, -1]))


class Seen:
    """Notes what a module is called with."""

    def __init__(self, module: nn.Module) -> None:
        self.arguments: dict[str, Any] = {}
        module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.arguments = kwargs


def extended_by_hand(mask: Tensor, window: int | None) -> Tensor:
    """A final mask with the rows' columns and rows, entry by entry."""
    batch, heads, queries, keys = mask.shape
    whole = torch.zeros(batch, heads, queries + LENGTH, keys + LENGTH, dtype=torch.bool)
    for at in range(queries + LENGTH):
        for key in range(keys + LENGTH):
            if key >= LENGTH and at >= LENGTH:
                whole[:, :, at, key] = mask[:, :, at - LENGTH, key - LENGTH]
            elif key < LENGTH:
                whole[:, :, at, key] = key <= at and (window is None or at - key < window)
    return whole


@pytest.fixture(params=["llava", "qwen2_vl", "gemma3"])
def merged(
    request: pytest.FixtureRequest,
) -> Iterator[tuple[nn.Module, nn.Module, Tensor, dict[str, Any], dict[str, Any]]]:
    """Host, bare copy, rows, inputs with an image, and what the bare language model is handed for them."""
    model, inputs = host(request.param)
    base, _, rows = adapt(model)
    seen = Seen(base.model.language_model)
    base(**inputs, use_cache=False)
    yield model, base, rows, inputs, dict(seen.arguments)


def test_images_are_merged_behind_the_rows(merged: Any) -> None:
    model, base, rows, inputs, handed = merged
    by_hand, tower = hand(rows), base.model.language_model
    embeds = in_front(by_hand, handed["inputs_embeds"])
    mask, places = handed["attention_mask"], handed["position_ids"]
    if isinstance(mask, dict):
        window = base.config.text_config.sliding_window
        mask = {kind: extended_by_hand(each, window if "sliding" in kind else None) for kind, each in mask.items()}
    elif mask is not None:
        mask = ones_in_front(mask)
    if places is not None:
        first = torch.arange(LENGTH).expand(*places.shape[:-1], LENGTH)
        places = torch.cat([first, places + LENGTH], dim=-1)
    hidden = tower(inputs_embeds=embeds, attention_mask=mask, position_ids=places, use_cache=False).last_hidden_state
    output = model(**inputs, use_cache=False)
    same_gradients(output.logits, base.lm_head(hidden[:, LENGTH:]), rows, by_hand)
