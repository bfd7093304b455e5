"""Generation behind rows: token by token and score by score what the bare host gives when it is run again and again,
without a cache and without padding, on embeddings that begin with the rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sequence_toys import (
    GREEDY,
    LENGTH,
    NEW,
    PATHS,
    Rows,
    adapt,
    for_padding,
    host,
    in_front,
    ones_in_front,
    padded,
    same,
    tokens,
)
from slowly import quick
from torch import Tensor, nn

import peftcore

HOSTS = (
    "llama",
    "gpt2",
    "short_mistral",
    "gemma3_text",
    "hybrid",
    "qwen2_window",
    "bloom",
    "opt",
    "falcon_new",
    "gpt_neox",
    "bert_decoder",
)


@torch.no_grad()
def by_hand(base: nn.Module, rows: Tensor, ids: Tensor, mask: Tensor, new: int = NEW) -> tuple[Tensor, list[Tensor]]:
    """Greedy decoding without peftcore, without a cache, without generate, each sequence alone and without padding."""
    found = [alone_by_hand(base, rows, row[seen.bool()][None], new) for row, seen in zip(ids, mask, strict=True)]
    tokens = torch.cat([ids, torch.cat([each[:, -new:] for each, _ in found])], dim=1)
    return tokens, [torch.cat(step) for step in zip(*(scores for _, scores in found), strict=True)]


def alone_by_hand(base: nn.Module, rows: Tensor, ids: Tensor, new: int) -> tuple[Tensor, list[Tensor]]:
    scores = []
    for _ in range(new):
        embeds = in_front(rows, base.get_input_embeddings()(ids))
        scores.append(base(inputs_embeds=embeds, use_cache=False).logits[:, -1])
        ids = torch.cat([ids, scores[-1].argmax(-1, keepdim=True)], dim=1)
    return ids, scores


@pytest.mark.share(3)
@pytest.mark.parametrize("left", [0, 2])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", quick(HOSTS, ["llama", "gpt2", "hybrid", "bloom"]))
def test_greedy(name: str, path: str, left: int) -> None:
    model = for_padding(name)
    base, injection, rows = adapt(model)
    ids = tokens()
    mask = padded(torch.ones_like(ids), left=left)
    expected, scores = by_hand(base, rows, ids, mask)
    options = {**GREEDY, **PATHS[path]}
    same(model.generate(ids, attention_mask=mask, **options), expected, scores)
    alone = base.generate(ids, attention_mask=mask, **options).logits[0]
    assert (alone - scores[0]).abs().max() > 1e-3
    with injection.disabled():
        assert torch.equal(model.generate(ids, attention_mask=mask, **options).logits[0], alone)


@pytest.mark.parametrize("path", ["cached", "static"])
@pytest.mark.parametrize("name", HOSTS)
def test_beams(name: str, path: str) -> None:
    model = for_padding(name)
    adapt(model)
    ids = tokens()
    mask = padded(torch.ones_like(ids), left=2)
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": NEW, "pad_token_id": 0}
    uncached = model.generate(ids, attention_mask=mask, do_sample=False, use_cache=False, **options)
    assert torch.equal(model.generate(ids, attention_mask=mask, do_sample=False, **PATHS[path], **options), uncached)


@pytest.mark.parametrize("name", ["llama", "gpt2", "short_mistral"])
@pytest.mark.parametrize("help", ["same", "other", "lookup"])
def test_assisted(name: str, help: str) -> None:
    """Drafts are checked, and what was drafted wrongly is cropped from the cache: the rows stay."""
    model = host(name)[0]
    base, _, rows = adapt(model)
    ids = tokens(rows=1)
    expected, scores = by_hand(base, rows, ids, torch.ones_like(ids))
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 2}
    if help != "lookup":
        assistant = base if help == "other" else host(name)[0]
        if help == "same":  # a prompt of its own, and a cache of its own that it crops by what the cache counts
            peftcore.apply(assistant, Rows, length=LENGTH + 1, dtype="float64", seed=3)
        options = {"assistant_model": assistant}
    same(model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY, **options), expected, scores)


@pytest.mark.parametrize("name", ["llama", "gpt2", "short_mistral"])
@pytest.mark.parametrize("path", ["cached", "static"])
def test_embeddings_into_generate(name: str, path: str) -> None:
    model = host(name)[0]
    base, _, rows = adapt(model)
    ids = tokens()
    mask = padded(torch.ones_like(ids), left=2)
    expected, scores = by_hand(base, rows, ids, mask)
    embeds = base.get_input_embeddings()(ids)
    output = model.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY, **PATHS[path])
    same(output, expected[:, ids.shape[1] :], scores)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["llama", "short_mistral", "hybrid"])
def test_a_conversation_goes_on_with_its_cache(name: str) -> None:
    """`generate` slices the ids by what the cache counts: the user's tokens, not the rows."""
    model = host(name)[0]
    base, _, rows = adapt(model)
    ids = tokens(rows=1)
    first = model.generate(ids, **GREEDY)
    assert first.past_key_values.get_seq_length() == ids.shape[1] + NEW - 1
    longer = torch.cat([first.sequences, tokens(rows=1, length=3, seed=4)], dim=1)
    expected, scores = by_hand(base, rows, longer, torch.ones_like(longer))
    same(model.generate(longer, past_key_values=first.past_key_values, **GREEDY), expected, scores)


@pytest.mark.share(3)
@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("target", ["stack", "stack.decoder"])
@pytest.mark.parametrize("path", ["cached", "uncached", "static"])
@pytest.mark.parametrize("beams", [1, 3])
def test_encoder_decoders(name: str, target: str, path: str, beams: int) -> None:
    model, inputs = host(name)
    base, _, rows = adapt(model, target=target)
    ids, mask = inputs["input_ids"], padded(torch.ones_like(inputs["input_ids"]), right=3)
    options = {**GREEDY, **PATHS[path], "num_beams": beams}
    output = model.generate(ids, attention_mask=mask, **options)
    if beams > 1:
        again = model.generate(ids, attention_mask=mask, **{**GREEDY, "num_beams": beams, "use_cache": False})
        assert torch.equal(output.sequences, again.sequences)
        return
    encoder, decoder = base.get_encoder(), base.get_decoder()
    given: dict[str, Any] = {"encoder_outputs": encoder(input_ids=ids, attention_mask=mask), "attention_mask": mask}
    if target == "stack":
        embeds = in_front(rows, encoder.embed_tokens(ids))
        given = {"encoder_outputs": encoder(inputs_embeds=embeds, attention_mask=ones_in_front(mask))}
        given["attention_mask"] = ones_in_front(mask)
    answer, scores = output.sequences[:, :1], []
    for _ in range(NEW):
        asked = {"decoder_input_ids": answer}
        if target != "stack":
            asked = {"decoder_inputs_embeds": in_front(rows, decoder.embed_tokens(answer))}
        scores.append(base(**given, **asked).logits[:, -1])
        answer = torch.cat([answer, scores[-1].argmax(-1, keepdim=True)], dim=1)
    same(output, answer, scores)


@pytest.mark.parametrize("left", [0, 2])
@pytest.mark.parametrize("name", ["mamba", "mamba2", "jamba", "zamba"])
def test_states_take_the_rows_in(name: str, left: int) -> None:
    model = host(name)[0]
    base, _, rows = adapt(model)
    ids = tokens()
    mask = padded(torch.ones_like(ids), left=left)
    expected, scores = by_hand(base, rows, ids, mask)
    same(model.generate(ids, attention_mask=mask, **GREEDY), expected, scores)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
@pytest.mark.parametrize("path", ["cached", "static"])
def test_images(name: str, path: str) -> None:
    """The prompt's forward is checked elsewhere; from there on, cached and uncached agree."""
    model, inputs = host(name)
    adapt(model)
    uncached = model.generate(**inputs, **{**GREEDY, "use_cache": False})
    cached = model.generate(**inputs, **{**GREEDY, **PATHS[path]})
    same(cached, uncached.sequences, list(uncached.logits))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "hybrid"])
def test_steps_that_generate_compiles(name: str) -> None:
    """As generate does by itself on accelerators with static caches: no graph breaks, and no graph for each step."""
    from torch._dynamo.utils import counters
    from transformers.generation import CompileConfig

    model, _ = host(name)
    base, _, rows = adapt(model)
    ids = tokens()
    mask = padded(torch.ones_like(ids), left=2)
    expected, scores = by_hand(base, rows, ids, mask)
    compiling = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    compiling._compile_all_devices = True
    torch.compiler.reset()
    counters.clear()
    options = {**GREEDY, "cache_implementation": "static", "compile_config": compiling}
    same(model.generate(ids, attention_mask=mask, **options), expected, scores)
    assert 1 <= counters["stats"]["unique_graphs"] <= 2
