"""Everything that comes with a sequence is kept in step with the rows in front, or refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from sequence_toys import LENGTH, Rows, adapt, by_hand, close, host, in_front, ones_in_front, padded, tokens

import peftcore
from peftcore.errors import NotMergeable, RouteError, SequenceError, UnsupportedSite


def test_labels_need_no_change_and_the_loss_counts_what_tokens_predict() -> None:
    model, _ = host("llama")
    base, _, rows = adapt(model)
    ids = tokens()
    mask = padded(torch.ones_like(ids), right=2)
    labels = ids.masked_fill(mask == 0, -100)
    output = model(input_ids=ids, attention_mask=mask, labels=labels)
    logits = by_hand(base, rows, ids, attention_mask=ones_in_front(mask))
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(output.loss, expected.to(output.loss.dtype), rtol=1e-6, atol=1e-6)
    embeds = in_front(rows, base.get_input_embeddings()(ids))
    others = torch.cat([torch.full((2, LENGTH), -100), labels], dim=1)
    theirs = base(inputs_embeds=embeds, attention_mask=ones_in_front(mask), labels=others).loss
    assert (theirs - output.loss).abs() > 1e-3  # it counts the first token too, which the last row predicts


def test_a_classifier_finds_its_token() -> None:
    """The last token that is no padding is told from the ids, in the coordinates of the user."""
    import transformers

    full, _ = host("llama")
    full.config.num_labels = 4
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(full.config).double().eval()
    base, _, rows = adapt(model)
    ids = tokens()
    mask = padded(torch.ones_like(ids), right=2)
    ids = ids.masked_fill(mask == 0, 0)
    embeds = in_front(rows, base.model.embed_tokens(ids))
    hidden = base.model(inputs_embeds=embeds, attention_mask=ones_in_front(mask)).last_hidden_state
    expected = base.score(hidden[torch.arange(2), LENGTH + torch.tensor([5, 3])])
    close(model(input_ids=ids, attention_mask=mask).logits, expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "roberta"])
def test_embeddings_in_the_place_of_ids(name: str) -> None:
    model, _ = host(name)
    adapt(model)
    ids = tokens()
    embeds = model.get_input_embeddings()(ids)
    mask = torch.ones_like(ids)
    close(model(inputs_embeds=embeds, attention_mask=mask).logits, model(input_ids=ids, attention_mask=mask).logits)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_inputs_by_position_and_tuples_back(name: str) -> None:
    model, _ = host(name)
    adapt(model)
    stack = model.model if name == "llama" else model.transformer
    expected = stack(input_ids=tokens()).last_hidden_state
    hidden, cache = stack(tokens(), return_dict=False)[:2]
    assert torch.equal(hidden, expected)
    assert cache.get_seq_length() == tokens().shape[1]


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "bert"])
def test_given_positions_are_moved_behind_the_rows(name: str) -> None:
    model, _ = host(name)
    base, _, rows = adapt(model)
    ids = tokens()
    places = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]])
    mask = padded(torch.ones_like(ids), left=2)
    behind = torch.cat([torch.arange(LENGTH).expand(2, -1), places + LENGTH], dim=1)
    expected = by_hand(base, rows, ids, attention_mask=ones_in_front(mask), position_ids=behind)
    output = model(input_ids=ids, attention_mask=mask, position_ids=places).logits
    close(output[mask.bool()], expected[mask.bool()])
    assert (expected - by_hand(base, rows, ids, attention_mask=ones_in_front(mask))).abs().max() > 1e-4


def test_token_types() -> None:
    model, _ = host("gpt2")
    base, _, rows = adapt(model)
    ids, kinds = tokens(), tokens(seed=8)
    whole = torch.cat([torch.zeros(2, LENGTH, dtype=torch.long), kinds], dim=1)
    close(model(input_ids=ids, token_type_ids=kinds).logits, by_hand(base, rows, ids, token_type_ids=whole))


def test_rows_are_seen_from_everywhere_where_some_tokens_are() -> None:
    """In attention with windows."""
    import transformers

    sizes = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LongformerConfig(**sizes, intermediate_size=24, attention_window=4, pad_token_id=1)
    model = transformers.LongformerForMaskedLM(config).double().eval()
    base, _, rows = adapt(model)
    ids, mask = tokens(length=14), padded(torch.ones(2, 14, dtype=torch.long), right=3)
    far = (torch.arange(14) == 5).long().expand(2, -1)
    whole = torch.cat([torch.ones(2, LENGTH, dtype=torch.long), far], dim=1)
    embeds = in_front(rows, base.get_input_embeddings()(ids))
    given = {"inputs_embeds": embeds, "attention_mask": ones_in_front(mask)}
    ours = model(input_ids=ids, attention_mask=mask, global_attention_mask=far).logits
    places = torch.arange(14 + LENGTH)[None].expand(2, -1) + 2
    close(
        ours[mask.bool()],
        base(**given, global_attention_mask=whole, position_ids=places).logits[:, LENGTH:][mask.bool()],
    )
    assert (ours - model(input_ids=ids, attention_mask=mask).logits)[mask.bool()].abs().max() > 1e-5


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("bert", {"attention_mask": torch.ones(2, 1, 6, 6, dtype=torch.bool)}, "shape .2, 1, 6, 6."),
        ("llama", {"attention_mask": torch.ones(2, 6, 6)}, "shape .2, 6, 6."),
        ("hybrid", {"attention_mask": {"chunked_attention": None}}, "chunked_attention"),
        ("llama", {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}, "packed"),
        ("llama", {"cu_seq_lens_q": torch.tensor([0, 3, 6])}, "cu_seq_lens_q"),
        ("llama", {"per_token": torch.ones(2, 6)}, "per_token"),
    ],
)
def test_what_nobody_can_keep_in_step_is_refused(name: str, given: dict[str, Any], says: str) -> None:
    model, _ = host(name)
    adapt(model)
    with pytest.raises(SequenceError, match=says):
        model(input_ids=tokens(), **given)


def test_encoder_outputs_without_the_rows_are_refused() -> None:
    model, inputs = host("t5")
    _, injection, _ = adapt(model)
    ids = inputs.pop("input_ids")
    mask = torch.ones_like(ids)
    with injection.disabled():
        encoded = model.encoder(input_ids=ids)
    with pytest.raises(SequenceError, match="not in the output"):
        model(encoder_outputs=encoded, attention_mask=mask, **inputs)
    again = model(encoder_outputs=model.encoder(input_ids=ids), attention_mask=mask, **inputs).logits
    close(again, model(input_ids=ids, attention_mask=mask, **inputs).logits)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_outputs_can_be_viewed(name: str) -> None:
    model, _ = host(name)
    adapt(model)
    stack = model.model if name == "llama" else model.bert
    states = stack(input_ids=tokens(), output_hidden_states=True).hidden_states
    assert {state.view(-1, 48).shape for state in states} == {torch.Size([12, 48])}


def test_attention_weights_are_those_of_the_tokens() -> None:
    model, _ = host("llama")
    model.set_attn_implementation("eager")
    base, _, rows = adapt(model)
    embeds = in_front(rows, base.get_input_embeddings()(tokens()))
    ours = model(input_ids=tokens(), output_attentions=True).attentions
    theirs = base(inputs_embeds=embeds, output_attentions=True).attentions
    for mine, other in zip(ours, theirs, strict=True):
        close(mine, other[:, :, LENGTH:])
        torch.testing.assert_close(mine.sum(-1), torch.ones_like(mine[..., 0]))


def test_routers_speak_of_the_tokens() -> None:
    """The auxiliary loss of a mixture reads the router's logits together with the mask of the user."""
    model, _ = host("mixtral")
    base, _, rows = adapt(model)
    ids = tokens()
    mask = padded(torch.ones_like(ids), right=2)
    output = model(input_ids=ids, attention_mask=mask, labels=ids, output_router_logits=True)
    embeds = in_front(rows, base.get_input_embeddings()(ids))
    hidden = base.model(inputs_embeds=embeds, attention_mask=ones_in_front(mask), output_router_logits=True)
    for ours, other in zip(output.router_logits, hidden.router_logits, strict=True):
        close(ours, other.view(2, LENGTH + 6, -1)[:, LENGTH:].flatten(0, 1))
    assert torch.isfinite(output.aux_loss)


def test_several_edits_stand_in_the_order_of_their_application() -> None:
    model, _ = host("llama")
    base, _, first = adapt(model)
    second = peftcore.apply(model, Rows, name="second", length=2, dtype="float64", seed=3)
    (other,) = (operator.value for operator in second.operators.values())
    ids = tokens()
    mask = padded(torch.ones_like(ids), right=2)
    rows = torch.cat([first, other])
    embeds = in_front(rows, base.get_input_embeddings()(ids))
    expected = base(inputs_embeds=embeds, attention_mask=ones_in_front(mask, 5), use_cache=False).logits[:, 5:]
    output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    close(output.logits, expected)
    assert {state.shape[1] for state in output.hidden_states} == {6}
    for options in ({}, {"cache_implementation": "static"}, {"num_beams": 2}):
        given = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **options}
        uncached = model.generate(ids, use_cache=False, **{**given, "cache_implementation": None})
        assert torch.equal(model.generate(ids, **given), uncached)
    with second.disabled():
        close(model(input_ids=ids).logits, by_hand(base, first, ids))


@pytest.mark.parametrize("name", ["bert_cls", "clip", "t5"])
def test_several_edits_where_stack_and_body_differ(name: str) -> None:
    model, inputs = host(name)
    adapt(model)
    peftcore.apply(model, Rows, name="second", length=2, dtype="float64", seed=3)
    values = [operator.value for each in peftcore.injections(model).values() for operator in each.operators.values()]
    alone, _ = host(name)
    joined = peftcore.apply(alone, Rows, length=LENGTH + 2, dtype="float64")
    (operator,) = joined.operators.values()
    operator.value.data.copy_(torch.cat(values))
    key = "logits_per_image" if name == "clip" else "logits"
    close(model(**inputs)[key], alone(**inputs)[key])
    if name == "clip":
        states = model.text_model(inputs["input_ids"], output_hidden_states=True).hidden_states
        assert {state.shape[1] for state in states} == {inputs["input_ids"].shape[1]}


def test_rows_that_follow_the_input() -> None:
    model, _ = host("llama")
    base, _, value = adapt(model, by_input=True)
    ids = tokens()
    embeds = base.get_input_embeddings()(ids)
    rows = value * embeds[:, :1].tanh()
    expected = base(inputs_embeds=torch.cat([rows, embeds], dim=1)).logits[:, LENGTH:]
    close(model(input_ids=ids).logits, expected)
    given = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **given), model.generate(ids, use_cache=False, **given))


def test_what_acts_on_the_table_acts_on_the_tokens_too() -> None:
    model, _ = host("llama")
    base, _, rows = adapt(model)
    table = peftcore.apply(model, "lora", target="embed", name="table", dtype="float64")
    with torch.no_grad():
        for parameter in table.parameters():
            parameter.add_(0.1)
    twin = peftcore.apply(base, "lora", target="embed", name="table", dtype="float64")
    for mine, other in zip(twin.parameters(), table.parameters(), strict=True):
        mine.data.copy_(other.data)
    close(model(input_ids=tokens()).logits, by_hand(base, rows, tokens()))


def test_a_table_that_is_exchanged_later() -> None:
    model, _ = host("llama")
    base, _, rows = adapt(model)
    for each in (model, base):
        torch.manual_seed(0)
        each.resize_token_embeddings(120, mean_resizing=False)
    ids = tokens().masked_fill(tokens() == tokens()[0, 0], 110)
    with torch.no_grad():
        base.get_input_embeddings().weight.copy_(model.get_input_embeddings().weight)
        base.lm_head.weight.copy_(model.lm_head.weight)
    close(model(input_ids=ids).logits, by_hand(base, rows, ids))


def test_routes_of_rows_are_refused() -> None:
    model, _ = host("llama")
    adapt(model)
    with pytest.raises(RouteError, match="toy_rows"):
        peftcore.route(model, ["toy_rows", None])


def test_rows_cannot_be_merged() -> None:
    model, _ = host("llama")
    _, injection, _ = adapt(model)
    with pytest.raises(NotMergeable):
        injection.merge()


@pytest.mark.parametrize("target", ["lm_head", "model.layers.0", "model.embed_tokens"])
def test_only_stacks_take_rows(target: str) -> None:
    model, _ = host("llama")
    with pytest.raises(UnsupportedSite, match="not a stack of tokens; those of this host are 'model'"):
        peftcore.apply(model, Rows, target=target)


TEXT = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT2 = {"vocab_size": 64, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 12}
OPT = {**{key: TEXT[key] for key in TEXT if key != "intermediate_size"}, "ffn_dim": 32, "word_embed_proj_dim": 24}
BART = {
    "vocab_size": 64, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
}  # fmt: skip
LIMITED: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", {**TEXT, "max_position_embeddings": 12}),
    "roberta": ("RobertaForMaskedLM", {**TEXT, "max_position_embeddings": 14}),  # two for padding
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "opt": ("OPTForCausalLM", {**OPT, "max_position_embeddings": 12}),  # its table has two more
    "bart": ("BartForConditionalGeneration", {**BART, "max_position_embeddings": 12}),
    "clip": ("CLIPTextModel", {**TEXT, "max_position_embeddings": 12}),
}
"""Hosts with positions for twelve tokens."""


def limited(name: str) -> torch.nn.Module:
    cls, sizes = LIMITED[name]
    model = getattr(transformers, cls)
    return model(model.config_class(**sizes)).eval()


@pytest.mark.parametrize("name", LIMITED)
def test_rows_and_text_are_no_more_than_the_positions(name: str) -> None:
    """Nine tokens fit behind three rows, and ten do not: the error says the numbers."""
    model = limited(name)
    bare = copy.deepcopy(model)
    adapter = peftcore.apply(model, Rows)
    ids = torch.randint(4, 60, (2, 10))
    model(input_ids=ids[:, :9])
    with pytest.raises(SequenceError, match="12 positions, but 3 rows in front of a text of 10 tokens need 13"):
        model(input_ids=ids)
    with adapter.disabled():
        torch.testing.assert_close(model(input_ids=ids)[0], bare(input_ids=ids)[0])


def test_a_text_that_goes_on_from_a_cache_is_counted_whole() -> None:
    peftcore.apply(model := limited("gpt2"), Rows)
    ids = torch.randint(4, 60, (2, 9))
    cache = model(input_ids=ids).past_key_values
    with pytest.raises(SequenceError, match="3 rows in front of a text of 10 tokens need 13"):
        model(input_ids=ids[:, :1], past_key_values=cache)


def test_padding_takes_no_position_where_tokens_alone_are_counted() -> None:
    peftcore.apply(model := limited("roberta"), Rows)
    ids = torch.randint(4, 60, (1, 8))
    long = torch.cat([torch.full((1, 7), model.config.pad_token_id), ids], 1)
    padded = model(input_ids=long, attention_mask=(long != model.config.pad_token_id).long()).logits[:, 7:]
    torch.testing.assert_close(padded, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_told_positions_count_and_not_places() -> None:
    peftcore.apply(model := limited("gpt2"), Rows)
    ids, mask = torch.randint(4, 60, (1, 14)), torch.ones(1, 14, dtype=torch.long)
    mask[:, :7] = 0
    model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    with pytest.raises(SequenceError, match="12 positions"):
        model(input_ids=ids, attention_mask=mask, position_ids=torch.arange(14)[None])


@pytest.mark.parametrize(("family", "most"), [("Llama", 12), ("MPNet", 64)])
def test_angles_and_distances_have_no_end(family: str, most: int) -> None:
    """MPNet has a table of positions, and one of 32 distances, which is no limit."""
    config = getattr(transformers, f"{family}Config")(**TEXT, max_position_embeddings=most)
    peftcore.apply(model := getattr(transformers, f"{family}Model")(config).eval(), Rows)
    assert model(input_ids=torch.randint(4, 60, (2, 40)))[0].shape == (2, 40, 24)


def test_rows_that_count_for_no_position_take_none() -> None:
    """Rows that come in at a block leave the text its positions."""
    peftcore.apply(model := limited("gpt2"), "lpt", layer=1, length=3)
    with peftcore.call(model, prompt_length=6):
        model(input_ids=torch.randint(4, 60, (2, 12)))
