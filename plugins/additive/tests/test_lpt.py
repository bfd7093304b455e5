"""LPT: numbers of the authors' models (`numbers/lpt.json`); what the prompt is made of; where it cannot be made."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sines import wave, waves
from torch import Tensor, nn

import peftcore
from peftcore.errors import MissingContext, NotMergeable, RouteError, SequenceError, UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.hosts import HOSTS
from peftcore.testing.kit import fill

SIZES = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
SIZES |= {"max_position_embeddings": 16}
WITHOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "intermediate_size": 12}
IDS = torch.tensor([[2, 5, 3, 9, 4, 6, 8], [4, 4, 10, 7, 1, 1, 1]])
REAL = torch.arange(7) < torch.tensor([[7], [4]])
NUMBERS = Path(__file__).parent / "numbers" / "lpt.json"
CODE: Any = {"repository": "xyltt/LPT", "commit": "634c7b2", "script": "encoder-only/models/modeling_roberta.py"}
OPTIONS = {"length": 3, "layer": 2, "hidden": 5, "dropout": 0.0, "dtype": "float64"}


def told(model: nn.Module, picture: Tensor) -> dict[str, Any]:
    return {"prompt_length": torch.tensor([3], device=picture.device)}


# Generation without a cache has to be told where the prompt ends: each sequence of the kit has three tokens at least.
# Five rows and five tokens, twice, for two experts, would have the size of the mixture's table.
@conformance("lpt", options={"moe": {"length": 4}}, context=told)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def small(name: str) -> Any:
    model: Any
    if name == "roberta":
        model = transformers.RobertaModel(transformers.RobertaConfig(**SIZES, **WITHOUT), add_pooling_layer=False)
    else:
        dropped = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model = transformers.GPT2Model(transformers.GPT2Config(**SIZES, **dropped))
    waves(dict(model.double().named_parameters()), 0.1)
    return model.train()


def generator_of(injection: peftcore.Injection) -> nn.Module:
    return next(each for path, each in injection.operators.items() if path.endswith("sequence"))


@against("authors", "lpt", **CODE)
@pytest.mark.parametrize("kind", ["naive", "average", "max", None])
@pytest.mark.parametrize("name", ["roberta", "gpt2"])
def test_numbers_of_the_authors(name: str, kind: str | None) -> None:
    """Outputs at tokens, and gradients, with padding on the right, in training. Their decoder takes the last token of
    the prompt, and pools those before it."""
    numbers = frozen(NUMBERS)[str(kind)][name]
    model = small(name)
    injection = peftcore.apply(model, "lpt", generator=kind, **OPTIONS)
    own = dict(generator_of(injection).named_parameters())
    theirs = {each: each.replace("down", "proj_down").replace("up", "proj_up") for each in own}
    waves({theirs[each]: parameter for each, parameter in own.items()}, 0.2)
    lengths = [5, 3] if kind == "naive" else [4, 2]
    with peftcore.call(model, prompt_length=lengths) if name == "gpt2" else peftcore.call(model):
        y = model(input_ids=IDS, attention_mask=REAL.long())[0]
    torch.testing.assert_close(
        y.masked_fill(~REAL[..., None], 0).flatten(), torch.tensor(numbers["output"]).double(), rtol=1e-6, atol=1e-7
    )
    (y.square() * wave(y.shape, 0.3) * REAL[..., None]).sum().backward()
    assert set(theirs.values()) == set(numbers["gradients"])
    for each, parameter in own.items():
        expected = torch.tensor(numbers["gradients"][theirs[each]], dtype=torch.float64)
        assert parameter.grad is not None and expected.abs().max() > 1e-4
        torch.testing.assert_close(parameter.grad.flatten(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("kind", "count"), [("naive", 791_680), ("average", 263_296), ("max", 263_296)])
def test_counts_of_a_roberta_large(kind: str, count: int) -> None:
    """Of the authors' script: five rows, a generator 128 wide."""
    with torch.device("meta"):
        config = transformers.RobertaConfig(hidden_size=1024, num_hidden_layers=2, num_attention_heads=16)
        model = transformers.RobertaModel(config)
    plan = peftcore.plan(model, "lpt", generator=kind)
    assert plan.trainable == count


def host(name: str) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, inputs = HOSTS[name].build()
    return model.double().eval().requires_grad_(False), inputs


def adapted(name: str, **options: Any) -> tuple[Any, dict[str, Tensor], peftcore.Injection]:
    model, inputs = host(name)
    injection = peftcore.apply(model, "lpt", **{"dtype": "float64", **options})
    fill(injection)
    return model, inputs, injection


def test_it_stands_in_the_middle() -> None:
    model, inputs, injection = adapted("bert")
    assert list(injection.state_dict()) == [
        f"bert:sequence.{each}.{kind}" for each in ("down", "up") for kind in ("weight", "bias")
    ]
    bare = host("bert")[0]
    given = {**inputs, "output_hidden_states": True}
    ours, alone = (each(**given).hidden_states for each in (model, bare))
    for state, other in zip(ours[:2], alone[:2], strict=True):
        torch.testing.assert_close(state, other, rtol=1e-10, atol=1e-10)
    assert (ours[2] - alone[2]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["naive", "average", "max", None])
@pytest.mark.parametrize("path", [{}, {"cache_implementation": "static"}, {"num_beams": 3}])
def test_generation_from_padded_prompts(kind: str | None, path: dict[str, Any]) -> None:
    """With caches, the prompt is made once, of what comes first; without one it has to be told where that ends."""
    model, _, _ = adapted("llama", generator=kind)
    ids, mask = torch.randint(3, 40, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0
    given = {
        "attention_mask": mask,
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "do_sample": False,
        "use_cache": True,
        **path,
    }
    cached = model.generate(ids, **given)
    with peftcore.call(model, prompt_length=[6, 4]):
        assert torch.equal(model.generate(ids, **{**given, "use_cache": False, "cache_implementation": None}), cached)
        assert torch.equal(model.generate(ids, **given), cached)
    if kind is not None:
        assert torch.equal(model.generate(ids, **{**given, "use_cache": False, "cache_implementation": None}), cached)
        with pytest.raises(MissingContext, match="prompt_length"):
            model.generate(ids, **{**given, "use_cache": False, "cache_implementation": None, "attention_mask": None})
        for told in ({}, {"prompt_length": [6, 4]}):
            with peftcore.call(model, **told), pytest.raises(SequenceError, match="has 6 tokens, but a forward gets"):
                model.generate(ids, prefill_chunk_size=3, **given)


@pytest.mark.parametrize("kind", ["naive", "average"])
def test_labels_say_where_the_prompt_ends(kind: str) -> None:
    model, _, _ = adapted("llama", generator=kind)
    ids = torch.randint(3, 40, (2, 6))
    labels = ids.clone()
    labels[:, :4] = -100
    by_labels = model(input_ids=ids, labels=labels).logits
    with peftcore.call(model, prompt_length=4):
        by_length = model(input_ids=ids).logits
    torch.testing.assert_close(by_labels, by_length, rtol=1e-12, atol=1e-12)
    other = ids.clone()
    other[:, 4:] = 5  # the answer does not get into the prompt
    torch.testing.assert_close(
        model(input_ids=other, labels=labels).logits[:, :4], by_length[:, :4], rtol=1e-12, atol=1e-12
    )
    with pytest.raises(MissingContext, match="would contain the answer"):
        model(input_ids=ids, labels=ids)
    with pytest.raises(SequenceError, match="in one call"), peftcore.call(model, prompt_length=9):
        model(input_ids=ids)


def test_it_learns_what_the_first_token_says() -> None:
    """A classifier that gave the same answer to all."""
    torch.manual_seed(0)
    model, _ = HOSTS["bert"].build()
    ids = torch.randint(3, 40, (24, 6))
    labels = ids[:, 0] % 3
    injection = peftcore.apply(model.train(), "lpt", dropout=0.0)
    optimizer = injection.optimizer(torch.optim.AdamW, lr=3e-3)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(input_ids=ids).logits, labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_dropout_acts_on_the_generated_prompt_in_training() -> None:
    model, inputs, _ = adapted("llama", dropout=0.5)
    quiet = model(**inputs).logits
    torch.testing.assert_close(model(**inputs).logits, quiet)
    model.train()
    assert (model(**inputs).logits - model(**inputs).logits).abs().max() > 1e-4


def test_what_it_refuses() -> None:
    model, inputs, injection = adapted("t5")
    with pytest.raises(NotMergeable):
        injection.merge()
    with pytest.raises(RouteError), peftcore.route(model, ["lpt", None]):
        model(**inputs)
    with pytest.raises(UnsupportedSite, match="target the encoder"):
        peftcore.apply(host("t5")[0], "lpt", target="stack.decoder")
    with pytest.raises(UnsupportedSite, match="blocks 0 to 1"):
        peftcore.apply(host("bert")[0], "lpt", layer=2)


@against("authors", "lpt", **CODE, part="start")
@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("wide", {"hidden": 12_000}),
        ("long", {"hidden": 5, "length": 3000}),
        ("alone", {"generator": None, "length": 3000}),
    ],
)
def test_start_is_the_authors(case: str, options: dict[str, Any]) -> None:
    """Of what is large: a generator 12,000 wide, one of 3,000 rows, and as many rows without one."""
    own = dict(generator_of(peftcore.apply(small("roberta").float(), "lpt", **options)).named_parameters())
    for name, told in frozen(NUMBERS, "start")[case].items():
        same_start(own[name], told)


@against("authors", "lpt", **CODE, part="trains")
@pytest.mark.parametrize("kind", ["naive", "average", "max", None])
def test_what_trains_is_what_the_authors_train(kind: Any) -> None:
    """The head of the words stays as it is."""
    model = transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SIZES, **WITHOUT))
    injection = peftcore.apply(model, "lpt", generator=kind, length=3, hidden=5, layer=2)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    own = dict(generator_of(injection).named_parameters())
    assert trained == {id(p) for p in own.values()}
    assert sorted(own) == frozen(NUMBERS, "trains")[str(kind)]


@against("authors", "lpt", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    same_defaults(peftcore.apply(host("llama")[0], "lpt").config, frozen(NUMBERS, "defaults"))
