"""Rows that come in inside of a stack: beside a bare host into whose middle a test's own hooks put them, with masks and
positions that the test makes by hand, and no cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
from host_zoo import build
from sequence_toys import GREEDY, LENGTH, PATHS, Inner, Rows, close, host, in_front, padded, same, stirred, tokens
from slowly import quick
from torch import Tensor, nn

import peftcore
from peftcore.errors import PluginError, RouteError, SequenceError, UnsupportedSite
from peftcore.forward.sequence.sequence_inside import Unseen

BLOCKS = {
    "llama": "model.layers",
    "short_mistral": "model.layers",
    "mixtral": "model.layers",
    "gpt_neox": "gpt_neox.layers",
    "gpt2": "transformer.h",
    "bert_decoder": "bert.encoder.layer",
    "bert": "bert.encoder.layer",
    "roberta": "roberta.encoder.layer",
    "distilbert": "distilbert.transformer.layer",
    "modernbert": "model.layers",
    "t5": "encoder.block",
    "opt": "model.decoder.layers",
}
DECODERS = ("llama", "short_mistral", "mixtral", "gpt_neox", "gpt2", "bert_decoder")
ENCODERS = ("bert", "roberta", "distilbert")
ROTARY = ("llama", "short_mistral", "mixtral", "gpt_neox")
PLACES = ([0], [1], [2], [1, 2])


def deep(name: str) -> Any:
    """A host of three blocks in float64."""
    model, _ = build("mistral" if name == "short_mistral" else name)
    options = {"num_layers": 3, "num_decoder_layers": 2} if name == "t5" else {"num_hidden_layers": 3}
    options |= {"sliding_window": 5} if name == "short_mistral" else {}
    options |= {"layer_types": None} if name == "modernbert" else {}
    options |= {"word_embed_proj_dim": model.config.hidden_size} if name == "opt" else {}
    with torch.random.fork_rng():
        return stirred(type(model)(type(model.config)(**{**model.config.to_dict(), **options})))


def adapt(model: nn.Module, blocks: list[int], **options: Any) -> tuple[Any, peftcore.Injection, Tensor]:
    """The bare copy, the injection and its values."""
    base = deepcopy(model)
    injection = peftcore.apply(model, Inner, blocks=blocks, dtype="float64", **options)
    operator = next(each for path, each in injection.operators.items() if path.endswith(":sequence"))
    return base, injection, operator.value


def visible(name: str, mask: Tensor, like: Tensor) -> Tensor:
    """The mask of a block behind the rows, from that of the tokens: 0 where something is seen."""
    whole = torch.cat([torch.ones(len(mask), LENGTH, dtype=mask.dtype), mask], dim=1).bool()
    count = whole.shape[1]
    seen = whole[:, None, None, :].expand(-1, 1, count, count)
    if name in DECODERS:
        seen = seen.tril()
    if name == "short_mistral":
        seen = seen.triu(-4)
    return torch.zeros_like(seen, dtype=like.dtype).masked_fill(~seen, torch.finfo(torch.float32).min)


@contextmanager
def in_the_middle(name: str, base: Any, values: Tensor, blocks: list[int], mask: Tensor) -> Iterator[None]:
    """Put rows into the middle of the bare host's stack, and drop them behind its last block."""

    def enter(depth: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            args, kwargs = list(args), dict(kwargs)
            x = args.pop(0) if args else kwargs.pop("hidden_states")
            if depth in blocks:
                value = values[blocks.index(depth)].expand(len(x), -1, -1)
                earlier = x[:, :LENGTH] if depth > blocks[0] else None
                value = value if earlier is None else value + 0.5 * earlier
                x = torch.cat([value, x if earlier is None else x[:, LENGTH:]], dim=1)
            place = {"gpt2": 1, "bert": 0, "roberta": 0, "bert_decoder": 0, "distilbert": 0, "t5": 0}.get(name)
            made = visible(name, mask, x)
            if place is not None and len(args) > place:
                args[place] = made
            else:
                kwargs["attention_mask"] = made
            if "position_embeddings" in kwargs:
                places = torch.arange(x.shape[1])[None]
                stack = base.gpt_neox if name == "gpt_neox" else base.model
                kwargs["position_embeddings"] = stack.rotary_emb(x, places)
            if name == "t5":
                args[1] = base.encoder.block[0].layer[0].SelfAttention.compute_bias(x.shape[1], x.shape[1])
            return (x, *args), kwargs

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        return (output[0][:, LENGTH:], *output[1:]) if isinstance(output, tuple) else output[:, LENGTH:]

    modules = base.get_submodule(BLOCKS[name])
    handles = [
        modules[depth].register_forward_pre_hook(enter(depth), with_kwargs=True)
        for depth in range(blocks[0], len(modules))
    ]
    if name != "t5":
        handles.append(modules[-1].register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def by_hand(name: str, base: Any, values: Tensor, blocks: list[int], ids: Tensor, mask: Tensor, **more: Any) -> Tensor:
    if name in ROTARY:  # float32 angles, so only those of the same places are equal
        more["position_ids"] = torch.arange(ids.shape[1])[None] + LENGTH
    with in_the_middle(name, base, values, blocks, mask):
        logits: Tensor = base(input_ids=ids, attention_mask=mask, **more).logits
    return logits


def uncached(name: str) -> dict[str, Any]:
    return {"use_cache": False} if name in DECODERS else {}


@pytest.mark.share(3)
@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("blocks", PLACES)
@pytest.mark.parametrize("name", (*DECODERS, *ENCODERS))
def test_beside_rows_in_the_middle(name: str, blocks: list[int], padding: int) -> None:
    """Outputs, and gradients of the rows and of embeddings."""
    base, _, values = adapt(model := deep(name), blocks)
    ids = tokens()
    mask = padded(torch.ones_like(ids), right=padding)
    given = {} if padding == 0 else {"attention_mask": mask}
    ours = model(input_ids=ids, **given, **uncached(name)).logits
    theirs = by_hand(name, base, values, blocks, ids, mask, **uncached(name))
    alone = base(input_ids=ids, **given, **uncached(name)).logits
    assert ours.shape == alone.shape
    real = mask.bool()
    close(ours[real], theirs[real])
    assert (ours - alone)[real].abs().max() > 1e-3
    direction = torch.randn_like(ours)
    gradients = [torch.autograd.grad((each * direction)[real].sum(), values)[0] for each in (ours, theirs)]
    assert gradients[1].abs().max() > 1e-6
    close(*gradients)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "roberta", "opt"])
def test_counted_rows_are_words_to_the_tokens(name: str) -> None:
    """Also where a stack makes positions by itself (OPT): beside a bare host behind zeros, which a hook replaces."""
    base, _, values = adapt(model := deep(name), [0], counted=True)
    ids = tokens()
    blocks = base.get_submodule(BLOCKS[name])

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        x = in_front(values[0], x[:, LENGTH:])
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    blocks[0].register_forward_pre_hook(enter, with_kwargs=True)
    embeds = base.get_input_embeddings()(ids)
    theirs = base(inputs_embeds=in_front(torch.zeros(LENGTH, embeds.shape[-1]), embeds)).logits[:, LENGTH:]
    close(model(input_ids=ids).logits, theirs)
    if name in ("gpt2", "bert", "roberta"):
        other = deep(name)
        _, _, uncounted = adapt(other, [0])
        uncounted.data.copy_(values.data)
        assert (other(input_ids=ids).logits - theirs).abs().max() > 1e-3


def test_rows_that_come_in_further_in_cannot_be_counted() -> None:
    with pytest.raises(PluginError, match="cannot count as positions"):
        peftcore.apply(deep("gpt2"), Inner, blocks=[1, 2], counted=True)


@pytest.mark.parametrize("told", [True, False], ids=["padded", "without-a-mask"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "short_mistral", "gpt2", "bert", "roberta"])
def test_both_kinds_of_attention(name: str, implementation: str, told: bool) -> None:
    """Where no mask is told and tokens see all others, functions are given none, and rows have to be hidden by one."""
    model = deep(name)
    model.set_attn_implementation(implementation)
    base, _, values = adapt(model, [1])
    ids = tokens()
    mask = padded(torch.ones_like(ids), right=2 if told else 0)
    ours = model(input_ids=ids, attention_mask=mask if told else None, **uncached(name)).logits
    theirs = by_hand(name, base, values, [1], ids, mask, **uncached(name))
    close(ours[mask.bool()], theirs[mask.bool()])


@pytest.mark.parametrize("blocks", PLACES)
def test_an_encoder_that_a_decoder_reads(blocks: list[int]) -> None:
    base, _, values = adapt(model := deep("t5"), blocks)
    ids, answer = tokens(), tokens(length=4, seed=2)
    mask = padded(torch.ones_like(ids), right=2)
    with in_the_middle("t5", base, values, blocks, mask):
        states = base.encoder(input_ids=ids, attention_mask=mask)
    assert states[0].shape[1] == ids.shape[1] + LENGTH
    whole = torch.cat([torch.ones(2, LENGTH, dtype=mask.dtype), mask], dim=1)
    theirs = base(encoder_outputs=states, attention_mask=whole, decoder_input_ids=answer).logits
    close(model(input_ids=ids, attention_mask=mask, decoder_input_ids=answer).logits, theirs)


@pytest.mark.parametrize("name", ["gpt2", "bert", "roberta", "bert_decoder"])
def test_below_tokens_are_what_they_are_alone(name: str) -> None:
    base, _, _ = adapt(model := deep(name), [2])
    ids = tokens()
    ours, alone = (each(input_ids=ids, output_hidden_states=True).hidden_states for each in (model, base))
    for depth in range(3):
        close(ours[depth], alone[depth])
    assert (ours[3] - alone[3]).abs().max() > 1e-3


@pytest.mark.share(3)
@pytest.mark.parametrize("left", [0, 2])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("blocks", [[1], [1, 2]])
@pytest.mark.parametrize("name", quick(DECODERS, ["llama", "short_mistral"]))
def test_generation(name: str, blocks: list[int], path: str, left: int) -> None:
    """Token by token and score by score what hooks in the middle give, without a cache and without padding."""
    base, injection, values = adapt(model := deep(name), blocks)
    ids = tokens()
    mask = padded(torch.ones_like(ids), left=left)
    found = [alone(name, base, values, blocks, row[seen.bool()][None]) for row, seen in zip(ids, mask, strict=True)]
    expected = torch.cat([ids, torch.cat([each[:, -9:] for each, _ in found])], dim=1)
    scores = [torch.cat(step) for step in zip(*(scores for _, scores in found), strict=True)]
    options = {**GREEDY, **PATHS[path]}
    same(model.generate(ids, attention_mask=mask, **options), expected, scores)
    with injection.disabled():
        bare = base.generate(ids, attention_mask=mask, **options).logits[0]
        assert torch.equal(model.generate(ids, attention_mask=mask, **options).logits[0], bare)
    assert (bare - scores[0]).abs().max() > 1e-3


@torch.no_grad()
def alone(name: str, base: Any, values: Tensor, blocks: list[int], ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    scores = []
    for _ in range(9):
        logits = by_hand(name, base, values, blocks, ids, torch.ones_like(ids), use_cache=False)
        scores.append(logits[:, -1])
        ids = torch.cat([ids, scores[-1].argmax(-1, keepdim=True)], dim=1)
    return ids, scores


@pytest.mark.parametrize("path", ["cached", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_beams(name: str, path: str) -> None:
    adapt(model := deep(name), [1])
    ids = tokens()
    mask = padded(torch.ones_like(ids), left=2)
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 9, "pad_token_id": 0, "do_sample": False}
    without = model.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(model.generate(ids, attention_mask=mask, **PATHS[path], **options), without)


@pytest.mark.parametrize("path", ["cached", "uncached", "static"])
@pytest.mark.parametrize("target", ["stack", "stack.decoder"])
def test_an_encoder_decoder_generates(target: str, path: str) -> None:
    adapt(model := deep("t5"), [1], target=target)
    ids, mask = tokens(), padded(torch.ones_like(tokens()), right=2)
    output = model.generate(ids, attention_mask=mask, **{**GREEDY, **PATHS[path]})
    answer = output.sequences[:, :-1]
    logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=answer, use_cache=False).logits
    for step, score in enumerate(output.logits):
        torch.testing.assert_close(score.double(), logits[:, step], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "short_mistral", "gpt2", "bert", "modernbert", "bert_decoder"])
def test_a_sequence_behind_padding_is_what_it_is_alone(name: str) -> None:
    adapt(model := deep(name), [1])
    ids = tokens()
    mask = padded(torch.ones_like(ids), left=2)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    together = model(input_ids=ids, attention_mask=mask, position_ids=places, **uncached(name)).logits[1, 2:]
    other = model(input_ids=ids[1:, 2:], **uncached(name)).logits[0]
    size = 1e-10 if name in ("gpt2", "bert", "bert_decoder") else 2e-5  # float32 angles
    torch.testing.assert_close(together, other, rtol=size, atol=size)


@pytest.mark.parametrize("name", ["llama", "gpt2", "roberta"])
def test_embeddings_and_positions_that_the_user_gives(name: str) -> None:
    base, _, values = adapt(model := deep(name), [1])
    ids, places = tokens(), torch.arange(6)[None] + 5
    by_ids = model(input_ids=ids, position_ids=places, **uncached(name)).logits
    with in_the_middle(name, base, values, [1], torch.ones_like(ids)):
        theirs = base(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=places, **uncached(name)).logits
    torch.testing.assert_close(by_ids, theirs, rtol=2e-5, atol=2e-5)
    embeds = base.get_input_embeddings()(ids)
    close(model(inputs_embeds=embeds, position_ids=places, **uncached(name)).logits, by_ids)
    if name == "gpt2":
        with pytest.raises(SequenceError, match="packed"):
            model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=False)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "short_mistral", "gpt2", "bert", "t5"])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    adapt_model = deep(name)
    _, _, values = adapt(adapt_model, [1, 2])
    for module in adapt_model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        vars(module).update({key: 0.0 for key, value in vars(module).items() if "dropout" in key and value == 0.1})
    ids, more = tokens(), {"decoder_input_ids": tokens(length=4)} if name == "t5" else uncached(name)
    given = {"input_ids": ids, "attention_mask": padded(torch.ones_like(ids), right=2), **more}
    adapt_model.train()
    (expected,) = torch.autograd.grad(adapt_model(**given).logits.square().sum(), values)
    adapt_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    adapt_model.enable_input_require_grads()
    adapt_model(**given).logits.square().sum().backward()
    assert values.grad is not None and expected.abs().max() > 1e-6
    torch.testing.assert_close(values.grad, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_compiled_without_a_break(name: str) -> None:
    _, _, values = adapt(model := deep(name), [1])
    ids = tokens()
    given = {"input_ids": ids, "attention_mask": padded(torch.ones_like(ids), right=2)}
    given |= {"decoder_input_ids": tokens(length=4)} if name == "t5" else {}
    expected = model(**given).logits
    (gradient,) = torch.autograd.grad(expected.square().sum(), values)
    torch.compiler.reset()
    logits = torch.compile(model, backend="aot_eager", fullgraph=True)(**given).logits
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(logits.square().sum(), values)[0], gradient, rtol=1e-8, atol=1e-8)


def test_with_rows_in_front_of_the_stack() -> None:
    """They count as tokens where they act outside; nearer to the blocks they are refused."""
    base, _, values = adapt(model := deep("gpt2"), [1])
    outer = peftcore.apply(model, Rows, name="outer", dtype="float64")
    (front,) = (operator.value for operator in outer.operators.values())
    ids = tokens()
    embeds = in_front(front, base.get_input_embeddings()(ids))
    with in_the_middle("gpt2", base, values, [1], torch.ones(2, 6 + LENGTH)):
        theirs = base(inputs_embeds=embeds, use_cache=False).logits[:, LENGTH:]
    close(model(input_ids=ids, use_cache=False).logits, theirs)
    peftcore.activate(model, "toy_inner")
    close(model(input_ids=ids, use_cache=False).logits, by_hand("gpt2", base, values, [1], ids, torch.ones_like(ids)))


def test_behind_rows_that_stand_nearer_to_the_blocks() -> None:
    """What is applied first stands in front: there the rows come in behind rows that are there from the beginning."""
    bare = deep("gpt2")
    model = deepcopy(bare)
    outer = peftcore.apply(model, Rows, name="outer", dtype="float64")
    (front,) = (operator.value for operator in outer.operators.values())
    inner = peftcore.apply(model, Inner, blocks=[1], dtype="float64")
    values = inner.operators["transformer:sequence"].value
    ids = tokens()

    def middle(module: nn.Module, args: Any) -> Any:
        x = args[0]
        x = torch.cat([x[:, :LENGTH], values.expand(len(x), -1, -1), x[:, LENGTH:]], dim=1)
        return (x, None, torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()[None, None], *args[3:])

    def later(module: nn.Module, args: Any) -> Any:
        count = args[0].shape[1]
        return (args[0], None, torch.ones(count, count, dtype=torch.bool).tril()[None, None], *args[3:])

    blocks = bare.transformer.h
    handles = [blocks[1].register_forward_pre_hook(middle), blocks[2].register_forward_pre_hook(later)]
    handles.append(blocks[2].register_forward_hook(lambda module, args, output: output[:, LENGTH:]))
    embeds = in_front(front, bare.get_input_embeddings()(ids))
    theirs = bare(inputs_embeds=embeds, use_cache=False).logits[:, LENGTH:]
    for handle in handles:
        handle.remove()
    close(model(input_ids=ids, use_cache=False).logits, theirs)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    mask = padded(torch.ones_like(ids), left=2)
    expected = model.generate(ids, attention_mask=mask, use_cache=False, **options)
    for more in ({}, {"cache_implementation": "static"}, {"num_beams": 1}):
        assert torch.equal(model.generate(ids, attention_mask=mask, **options, **more), expected)


@pytest.mark.parametrize("name", ["llama", "short_mistral", "gpt2", "bert", "roberta"])
def test_two_that_come_in_at_different_blocks(name: str) -> None:
    """With padding on the left, whatever the batch: what the sequence is alone; and with caches what it is without."""
    model = deep(name)
    peftcore.apply(model, Inner, name="one", blocks=[2], length=2, dtype="float64")
    peftcore.apply(model, Inner, name="two", blocks=[1, 2], dtype="float64", seed=3)
    ids = tokens()
    mask = padded(torch.ones_like(ids), left=2)
    places = {} if name == "roberta" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    ids = ids.masked_fill(mask == 0, 0)  # of which RoBERTa knows padding
    together = model(input_ids=ids, attention_mask=mask, **places, **uncached(name)).logits[1, 2:]
    other = model(input_ids=ids[1:, 2:], **uncached(name)).logits[0]
    size = 2e-5 if name in ROTARY else 1e-10
    torch.testing.assert_close(together, other, rtol=size, atol=size)
    if name in DECODERS:
        options = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
        expected = model.generate(ids, use_cache=False, **options)
        for more in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}):
            assert torch.equal(model.generate(ids, **options, **more), expected)


REFUSED = {
    "opt": ([1], "width 24"),
    "bart": ([1], "computes positions itself"),
    "whisper": ([1], "computes positions itself"),
    "mamba": ([1], "linear_attention"),
    "jamba": ([1], "linear_attention"),
    "bloom": ([1], "attention interface"),
    "clip": ([1], "embeddings"),
    "chunked": ([1], "chunked_attention"),
    "llama": ([2], "blocks 0 to 1"),
    "albert": ([0], "width 24"),
    "deberta_v2": ([1], "attention interface"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_kept_in_step_is_refused(name: str) -> None:
    blocks, says = REFUSED[name]
    model, _ = host(name)
    before = [*model.state_dict()]
    with pytest.raises(UnsupportedSite, match=says):
        peftcore.apply(model, Inner, blocks=blocks)
    assert [*model.state_dict()] == before


def test_a_block_that_runs_several_times_is_refused() -> None:
    bare, _ = host("albert")
    model = stirred(type(bare)(type(bare.config)(**{**bare.config.to_dict(), "embedding_size": 48})))
    with pytest.raises(UnsupportedSite, match="several times"):
        adapt(model, [0])


def test_routes_of_rows_are_refused() -> None:
    adapt(model := deep("llama"), [1])
    with pytest.raises(RouteError, match="toy_inner"), peftcore.route(model, ["toy_inner", None]):
        model(input_ids=tokens())


def test_without_the_hidden_columns_tokens_would_see_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests beside hooks would miss if placeholders were nothing: zeros take their part of a softmax."""
    base, _, values = adapt(model := deep("gpt2"), [1])
    ids = tokens()
    theirs = by_hand("gpt2", base, values, [1], ids, torch.ones_like(ids), use_cache=False)
    monkeypatch.setattr(Unseen, "forward", lambda self, attend, *qkv: attend(*qkv))
    assert (model(input_ids=ids, use_cache=False).logits - theirs).abs().max() > 1e-3
