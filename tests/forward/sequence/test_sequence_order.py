"""A sequence with padding on the left gives what it gives alone: its rows stand behind the padding."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from sequence_toys import LENGTH, Rows, adapt, close, for_padding, host, padded, tokens
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import peftcore
from peftcore.errors import SequenceError
from peftcore.forward.sequence.sequence_order import Order

LEFT, COUNT = 4, 10
WINDOWS = ("short_mistral", "hybrid", "qwen2_window", "chunked", "gpt_oss")
OTHERS = ("llama", "gpt_neox", "gpt2", "gemma2", "mpt", "bloom", "falcon_old", "opt", "mamba", "mamba2", "jamba")


def batch(count: int = COUNT, left: int = LEFT) -> tuple[Tensor, Tensor]:
    """Ids and their mask; the last sequence begins with padding."""
    ids = tokens(length=count)
    return ids, padded(torch.ones_like(ids), left=left)


def counted(model: nn.Module, mask: Tensor) -> dict[str, Tensor]:
    """The position_ids that `generate` makes, where the host takes any."""
    takes = "position_ids" in inspect.signature(model.forward).parameters
    return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if takes else {}


def near(ours: Tensor, alone: Tensor, exact: bool | None = None) -> None:
    """Equal but for rounding; rotary angles are float32 in any host, and differ with the places.

    `exact` says whether all was computed in float64, where the dtype does not say it: gradients have the rows' dtype.
    """
    size = 1e-10 if (ours.dtype == torch.float64 if exact is None else exact) else 2e-4
    torch.testing.assert_close(ours, alone, rtol=size, atol=size)


def test_an_order_by_hand() -> None:
    order = Order(2, torch.tensor([0, 3, 1]))
    joined = torch.arange(5).expand(3, -1)
    ordered = torch.tensor([[0, 1, 2, 3, 4], [2, 3, 4, 0, 1], [2, 0, 1, 3, 4]])  # 0 and 1 are the rows
    assert torch.equal(order.put(joined), ordered)
    assert torch.equal(order.joined(ordered), joined)
    assert torch.equal(order.dropped(ordered), torch.tensor([[2, 3, 4]] * 3))
    assert torch.equal(order.put(joined[:, :, None].expand(-1, -1, 4)), ordered[:, :, None].expand(-1, -1, 4))
    assert torch.equal(order.put(joined.expand(2, 3, 5), dim=-1, batch=-2), ordered.expand(2, 3, 5))
    assert torch.equal(order.first(torch.arange(12).view(3, 4)), torch.tensor([[0], [7], [9]]))
    assert torch.equal(order.changed(lambda before: before.flip(0)).put(joined), ordered.flip(0))
    plain = Order(2)
    assert plain.put(joined) is joined and plain.joined(joined) is joined
    assert torch.equal(plain.dropped(joined), joined[:, 2:]) and plain.changed(torch.flip) is plain


@pytest.mark.parametrize("name", (*WINDOWS, *OTHERS))
def test_a_row_of_a_padded_batch_is_what_it_is_alone(name: str) -> None:
    """Outputs at its tokens, hidden states, and what the rows learn from it."""
    model = for_padding(name)
    _, _, rows = adapt(model)
    ids, mask = batch()
    given = {"use_cache": False, "output_hidden_states": True}
    together = model(input_ids=ids, attention_mask=mask, **counted(model, mask), **given)
    alone = model(input_ids=ids[1:, LEFT:], **given)
    assert together.logits.shape[:2] == ids.shape
    near(together.logits[1, LEFT:], alone.logits[0])
    for ours, other in zip(together.hidden_states, alone.hidden_states, strict=True):
        near(ours[1, LEFT:], other[0])
    direction = torch.randn_like(alone.logits[0])
    (learnt,) = torch.autograd.grad((together.logits[1, LEFT:] * direction).sum(), rows)
    (other,) = torch.autograd.grad((alone.logits[0] * direction).sum(), rows)
    assert other.abs().max() > 1e-6
    near(learnt, other, exact=together.logits.dtype == torch.float64)
    near(together.logits[0], model(input_ids=ids[:1], **given).logits[0])


@pytest.mark.parametrize("name", ["short_mistral", "llama", "mpt", "gpt_neox"])
@pytest.mark.parametrize("places", [None, 0, 7])
def test_positions_go_on_from_the_first_token(name: str, places: int | None) -> None:
    """Nobody says them, or they count padding too: the rows are no further from the tokens for it."""
    model = for_padding(name)
    adapt(model)
    ids, mask = batch()
    given = {} if places is None or name == "mpt" else {"position_ids": torch.arange(COUNT)[None] + places}
    together = model(input_ids=ids, attention_mask=mask, **given).logits[1, LEFT:]
    torch.testing.assert_close(together, model(input_ids=ids[1:, LEFT:]).logits[0], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["short_mistral", "hybrid", "llama"])
def test_attention_weights_have_the_columns_of_what_is_attended_to(name: str) -> None:
    model = host(name)[0].float()  # the eager kind
    model.set_attn_implementation("eager")
    adapt(model)
    ids, mask = batch()
    together = model(input_ids=ids, attention_mask=mask, **counted(model, mask), output_attentions=True).attentions
    alone = model(input_ids=ids[1:, LEFT:], output_attentions=True).attentions
    for ours, other in zip(together, alone, strict=True):
        assert ours.shape[2:] == (COUNT, COUNT + LENGTH)
        near(ours[1:, :, LEFT:, LEFT:], other)
        assert ours[1:, :, LEFT:, :LEFT].abs().max() == 0


def test_the_loss_is_that_of_the_sequences_alone() -> None:
    model, _ = host("hybrid")
    adapt(model)
    ids, mask = batch()
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, LEFT] = -100  # padding predicts it
    together = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    alone = [model(input_ids=each, labels=each).loss * (each.shape[1] - 1) for each in (ids[:1], ids[1:, LEFT:])]
    torch.testing.assert_close(together, sum(alone) / (2 * COUNT - LEFT - 2), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["modernbert", "roberta"])
def test_encoders(name: str) -> None:
    model, _ = host(name)
    adapt(model)
    ids, mask = batch()
    ids = ids.masked_fill(mask == 0, 0)
    together = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    alone = model(input_ids=ids[1:, LEFT:], output_hidden_states=True)
    torch.testing.assert_close(together.logits[1, LEFT:], alone.logits[0], rtol=1e-5, atol=1e-5)
    for ours, other in zip(together.hidden_states, alone.hidden_states, strict=True):
        torch.testing.assert_close(ours[1, LEFT:], other[0], rtol=1e-5, atol=1e-5)


def test_token_types() -> None:
    model, _ = host("gpt2")
    adapt(model)
    (ids, mask), kinds = batch(), tokens(length=COUNT, seed=8)
    together = model(input_ids=ids, attention_mask=mask, token_type_ids=kinds, **counted(model, mask)).logits
    close(together[1, LEFT:], model(input_ids=ids[1:, LEFT:], token_type_ids=kinds[1:, LEFT:]).logits[0])


@pytest.mark.parametrize("name", ["t5", "mt5"])
def test_what_readers_of_an_encoder_see(name: str) -> None:
    """The rows come first in the encoder's output, whatever was padded."""
    model, inputs = host(name)
    adapt(model)
    ids, mask = batch()
    answer = inputs["decoder_input_ids"]
    together = model(input_ids=ids, attention_mask=mask, decoder_input_ids=answer)
    alone = model(input_ids=ids[1:, LEFT:], decoder_input_ids=answer[1:])
    close(together.logits[1], alone.logits[0])
    close(together.encoder_last_hidden_state[1, :LENGTH], alone.encoder_last_hidden_state[0, :LENGTH])
    close(together.encoder_last_hidden_state[1, LENGTH + LEFT :], alone.encoder_last_hidden_state[0, LENGTH:])
    given = {"max_new_tokens": 5, "do_sample": False}
    both = model.generate(ids, attention_mask=mask, **given)
    one = model.generate(ids[1:, LEFT:], attention_mask=mask[1:, LEFT:], **given)
    assert torch.equal(both[1, : one.shape[1]], one[0])


def final(mask: Tensor, kind: torch.dtype, window: int | None = None) -> Tensor:
    """The final mask that says what one of [batch, length] says."""
    at = torch.arange(mask.shape[1])
    seen = (at <= at[:, None]) & (mask[:, None, None] == 1)
    if window is not None:
        seen = seen & (at[:, None] - at < window)
    return seen if kind == torch.bool else torch.zeros(seen.shape, dtype=kind).masked_fill(~seen, -1e300)


@pytest.mark.parametrize("kind", [torch.bool, torch.float64])
@pytest.mark.parametrize("name", ["llama", "short_mistral", "hybrid", "qwen2_window"])
def test_final_masks_tell_of_padding_too(name: str, kind: torch.dtype) -> None:
    model, _ = host(name)
    adapt(model)
    ids, mask = batch()
    window = getattr(model.config, "sliding_window", None)
    whole: Any = final(mask, kind, window if name == "short_mistral" else None)
    if name in ("hybrid", "qwen2_window"):
        whole = {"full_attention": whole, "sliding_attention": final(mask, kind, window)}
    given = counted(model, mask)
    together = model(input_ids=ids, attention_mask=whole, **given).logits
    close(together[1, LEFT:], model(input_ids=ids[1:, LEFT:]).logits[0])
    close(together[0], model(input_ids=ids[:1]).logits[0])


def test_a_final_mask_for_all_sequences() -> None:
    model, _ = host("llama")
    adapt(model)
    ids, mask = batch(count=6)
    ids, mask = torch.cat([ids, ids]), mask[1:]
    output = model(input_ids=ids, attention_mask=final(mask, torch.bool))
    torch.testing.assert_close(output.logits[:, LEFT:], model(input_ids=ids[:, LEFT:]).logits, rtol=1e-5, atol=1e-5)
    output.past_key_values.reorder_cache(torch.tensor([3, 2, 1, 0]))
    longer = nn.functional.pad(mask, (0, 1), value=1).expand(4, -1)
    further = model(input_ids=ids[:, :1], attention_mask=longer, past_key_values=output.past_key_values).logits
    whole = torch.cat([ids.flip(0), ids[:, :1]], dim=1)[:, LEFT:]
    torch.testing.assert_close(further, model(input_ids=whole).logits[:, -1:], rtol=1e-5, atol=1e-5)


def test_a_final_mask_of_another_size_is_refused() -> None:
    model, _ = host("llama")
    adapt(model)
    ids, mask = batch()
    cache = model(input_ids=ids[:, :6], attention_mask=mask[:, :6]).past_key_values
    with pytest.raises(SequenceError, match="mask has 9 keys"):
        model(input_ids=ids[:, 6:], attention_mask=final(mask, torch.bool)[:, :, 6:, 1:], past_key_values=cache)


@pytest.mark.parametrize(
    ("way", "static"), [("flipped", False), ("flipped", True), ("chosen", False), ("repeated", False)]
)
@pytest.mark.parametrize("name", ["short_mistral", "hybrid"])
def test_a_cache_knows_where_the_rows_of_its_sequences_stand(name: str, way: str, static: bool) -> None:
    model, _ = host(name)
    adapt(model)
    ids, mask = batch()
    cache = StaticCache(config=model.config, max_cache_len=20) if static else DynamicCache(config=model.config)
    places = counted(model, mask)["position_ids"]
    with torch.no_grad():
        for part in (slice(0, 6), slice(6, 9)):
            given = {"attention_mask": mask[:, : part.stop], "position_ids": places[:, part]}
            model(input_ids=ids[:, part], past_key_values=cache, **given)
    order = torch.tensor({"flipped": [1, 0], "chosen": [1], "repeated": [0, 0, 1, 1]}[way])
    if way == "flipped":
        cache.reorder_cache(order)
    elif way == "chosen":
        cache.batch_select_indices(order)
    else:
        cache.batch_repeat_interleave(2)
    given = {"attention_mask": mask[order], "position_ids": places[order, 9:]}
    output = model(input_ids=ids[order, 9:], past_key_values=cache, **given).logits[:, -1]
    alone = torch.cat([model(input_ids=each).logits[:, -1] for each in (ids[:1], ids[1:, LEFT:])])
    close(output, alone[order])


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
def test_images_behind_padding(name: str) -> None:
    """Gemma 3 makes final masks by kind of layer, in which images see all of themselves."""
    model, inputs = host(name)
    adapt(model)
    alone = model(**inputs, use_cache=False).logits
    along = {key: value for key, value in inputs.items() if value.shape == inputs["input_ids"].shape}
    along["attention_mask"] = torch.ones_like(inputs["input_ids"])
    longer = {**inputs, **{key: nn.functional.pad(value, (LEFT, 0)) for key, value in along.items()}}
    torch.testing.assert_close(model(**longer, use_cache=False).logits[:, LEFT:], alone, rtol=1e-5, atol=1e-5)
    given: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(**{**inputs, "attention_mask": along["attention_mask"]}, **given)
    for path in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(**longer, **given, **path)[:, -6:], expected[:, -6:])


@pytest.mark.parametrize("name", ["short_mistral", "hybrid"])
@pytest.mark.parametrize("path", [{}, {"cache_implementation": "static"}])
def test_beams(name: str, path: dict[str, Any]) -> None:
    model, _ = host(name)
    adapt(model)
    ids, mask = batch()
    given = {"num_beams": 3, "max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False, "pad_token_id": 0, **path}
    together = model.generate(ids, attention_mask=mask, **given)
    for row, left in ((0, 0), (1, LEFT)):
        alone = model.generate(ids[row : row + 1, left:], attention_mask=mask[row : row + 1, left:], **given)
        assert torch.equal(together[row, left:], alone[0])


CHUNKS = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "prefill_chunk_size": LEFT}


@pytest.mark.parametrize("path", [{}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("name", ["short_mistral", "hybrid", "jamba"])
def test_padding_that_comes_after_the_rows_is_refused(name: str, path: dict[str, Any]) -> None:
    model = for_padding(name)
    adapt(model)
    ids, mask = batch(left=LEFT + 1)
    options = {**CHUNKS, **({} if name == "jamba" else path)}  # Jamba has no static caches
    with pytest.raises(SequenceError, match="longer than the padding"):
        model.generate(ids, attention_mask=mask, **options)
    model.generate(ids, attention_mask=mask, **{**options, "prefill_chunk_size": LEFT + 2})


def test_padding_that_comes_after_the_rows_is_refused_where_nobody_says_the_positions() -> None:
    model, _ = host("llama")
    adapt(model)
    ids, mask = batch()
    cache = model(input_ids=ids[:, :3], attention_mask=mask[:, :3]).past_key_values
    with pytest.raises(SequenceError, match="longer than the padding"):
        model(input_ids=ids[:, 3:], attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("static", [False, True])
def test_padding_that_comes_after_the_rows_where_its_places_do_not_count(static: bool) -> None:
    model, _ = host("llama")
    adapt(model)
    ids, mask = batch(left=LEFT + 1)
    options = {"cache_implementation": "static"} if static else {}
    output = model.generate(ids, attention_mask=mask, **CHUNKS, **options)
    given = {**CHUNKS, "prefill_chunk_size": None}
    alone = model.generate(ids[1:, LEFT + 1 :], attention_mask=mask[1:, LEFT + 1 :], **given)
    assert torch.equal(output[1, LEFT + 1 :], alone[0])


@pytest.mark.parametrize("name", ["short_mistral", "llama", "hybrid"])
@pytest.mark.parametrize("path", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_a_sequence_of_nothing_but_padding_goes_on_from_the_rows(name: str, path: dict[str, Any]) -> None:
    """However much padding it is."""
    model, _ = host(name)
    adapt(model)
    ids, mask = batch(left=COUNT)
    given = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **path}
    output = model.generate(ids, attention_mask=mask, **given)
    assert torch.equal(output[1, -6:], model.generate(ids[1:, -1:], attention_mask=mask[1:, -1:], **given)[0, -6:])


@pytest.mark.parametrize("name", ["short_mistral", "hybrid"])
def test_several_edits(name: str) -> None:
    model, _ = host(name)
    adapt(model)
    peftcore.apply(model, Rows, name="second", length=2, dtype="float64", seed=3)
    ids, mask = batch()
    together = model(input_ids=ids, attention_mask=mask, **counted(model, mask)).logits
    close(together[1, LEFT:], model(input_ids=ids[1:, LEFT:]).logits[0])
    given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(ids[1:, LEFT:], attention_mask=mask[1:, LEFT:], **given)
    for path in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        assert torch.equal(model.generate(ids, attention_mask=mask, **given, **path)[1, LEFT:], alone[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["short_mistral", "hybrid", "llama", "roberta"])
def test_any_padding_runs_in_one_compiled_graph(name: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    model, _ = host(name)
    adapt(model)
    batches = [batch(left=left) for left in (LEFT, 0, 2)]
    expected = [model(input_ids=ids, attention_mask=mask).logits for ids, mask in batches]
    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    graphs = []
    for (ids, mask), logits in zip(batches, expected, strict=True):
        output = compiled(input_ids=ids, attention_mask=mask).logits
        close(output[mask.bool()], logits[mask.bool()])
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1]


def test_the_order_of_a_pooled_text() -> None:
    """Where embeddings come in further in: the tower is what it is behind as many tokens that nobody sees."""
    model, inputs = host("clip")
    base, _, rows = adapt(model)
    tower, ids = base.text_model, inputs["input_ids"]
    mask = padded(torch.ones_like(ids), left=2)
    embeds = tower.embeddings.token_embedding(ids)
    embeds = torch.stack([torch.cat([rows, embeds[0]]), torch.cat([embeds[1, :2], rows, embeds[1, 2:]])])
    whole = padded(torch.ones(embeds.shape[:2], dtype=torch.long), left=2)
    hidden = tower.embeddings(inputs_embeds=embeds)
    hidden = tower.encoder(inputs_embeds=hidden, attention_mask=final(whole, torch.bool)).last_hidden_state
    expected = tower.final_layer_norm(hidden)
    output = model.text_model(ids, attention_mask=mask).last_hidden_state
    close(output[0], expected[0, LENGTH:])
    close(output[1, 2:], expected[1, 2 + LENGTH :])
