"""SMoP: the kit; what the authors' router and prompts give for one text, in evaluation and in training; batches, and
generation, where each text keeps the prompt that it was given."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from prompted_hosts import host, outputs
from sines import wave

import peftcore
from peftcore.errors import ConfigError, UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.kit import fill

NUMBERS = Path(__file__).parent / "numbers" / "smop.json"
CODE: Any = {
    "repository": "jyjohnchoi/SMoP",
    "commit": "34da5e2",
    "script": "peft_models/tuners/prompt_routing.py",
}
MASKS = [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]


# Generation without a cache has to be told where the text ends.
@conformance("smop", options={"*": {"length": 3}}, context=lambda model, picture: {"prompt_length": 3})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def prompted(model: Any, **options: Any) -> Any:
    injection = peftcore.apply(model, "smop", dtype="float64", **options)
    (operator,) = injection.operators.values()
    return operator


@pytest.mark.parametrize("training", [False, True])
@against("authors", "smop", **CODE)
def test_the_authors_numbers(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of texts one by one, together: which prompt, its rows, and gradients of all prompts and of the router."""
    operator = prompted(host("llama")[0], length=3).train(training)
    monkeypatch.setattr(torch, "randn_like", lambda like: wave((1, 4), 0.71).expand_as(like))
    with torch.no_grad():
        operator.prompts = torch.nn.Parameter(wave((12, 6), 0.41).view(4, 3, 6))
        operator.router = torch.nn.Parameter(2 * wave((4, 6), 0.37))
    embeds, text = wave((3, 4, 6), 0.29), torch.tensor(MASKS).bool()
    rows, numbers = operator.rows_of(embeds, text), frozen(NUMBERS)
    for index in range(3):
        expected = numbers[f"{'training' if training else 'evaluation'} {index}"]
        assert operator.probabilities(embeds, text)[index].argmax().item() == expected["chosen"][0]
        assert rows[index].flatten().tolist() == pytest.approx(expected["rows"], abs=1e-7)
        direction = (rows[index] * wave((3, 6), 0.23)).sum()
        gradients = torch.autograd.grad(direction, [operator.prompts, operator.router], retain_graph=True)
        for name, gradient in zip(("prompts", "router"), gradients, strict=True):
            assert gradient.flatten().tolist() == pytest.approx(expected[name], abs=1e-7), name
    assert len({numbers[f"evaluation {index}"]["chosen"][0] for index in range(3)}) == 3


@pytest.mark.parametrize("name", ["t5", "bert", "llama"])
def test_equation(name: str) -> None:
    """Each text of a batch gets in front what it gets alone; padding counts for nothing; two prompts added up."""
    model, _ = host(name)
    base = deepcopy(model)
    operator = prompted(model, length=3, top_k=2)
    fill(next(iter(peftcore.injections(model).values())))
    ids = torch.tensor([[5, 6, 7, 8], [9, 3, 4, 1], [12, 2, 3, 1]])
    mask = torch.tensor(MASKS)
    more = {"decoder_input_ids": ids[:, :2]} if name == "t5" else {}
    ours = outputs(name, model, input_ids=ids, attention_mask=mask, **more)
    table, seen = base.get_input_embeddings(), []
    for index, count in enumerate((4, 2, 3)):
        words = table(ids[index : index + 1, :count])
        odds = torch.softmax(operator.router @ words[0].mean(0), -1)
        one, other = odds.topk(2).indices.tolist()
        rows = odds[one] * operator.prompts[one] + odds[other] * operator.prompts[other]
        some = {key: value[index : index + 1] for key, value in more.items()}
        theirs = outputs(name, base, inputs_embeds=torch.cat([rows[None], words], 1), **some)[0]
        if name != "t5":
            theirs = theirs[3:]
        torch.testing.assert_close(ours[index, : len(theirs)], theirs, rtol=1e-9, atol=1e-9)
        seen.append((one, other))
    assert len(set(seen)) > 1


def test_a_generated_token_changes_no_route() -> None:
    model, inputs = host("llama")
    prompted(model, length=3)
    fill(next(iter(peftcore.injections(model).values())))
    given = {"input_ids": inputs["input_ids"], "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached = model.generate(**given, use_cache=True)
    with peftcore.call(model, prompt_length=inputs["input_ids"].shape[1]):
        assert torch.equal(cached, model.generate(**given, use_cache=False))


def test_answers_choose_nothing() -> None:
    """In training the prompt is that of what comes before the first label."""
    model, _ = host("llama")
    prompted(model, length=3, noise=0.0)
    fill(next(iter(peftcore.injections(model).values())))
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    labels = torch.tensor([[-100, -100, -100, 8, 9, 10]])
    model.train()
    one = model(input_ids=ids, labels=labels).logits
    other = model(input_ids=torch.where(labels < 0, ids, 30), labels=labels).logits
    torch.testing.assert_close(one[:, :3], other[:, :3], rtol=1e-10, atol=1e-10)


@against("authors", "smop", **CODE, part="start")
def test_start_is_the_authors() -> None:
    """Many small prompts here, few wide ones there; the router's rows are orthonormal, which no draw changes."""
    (operator,) = peftcore.apply(host("llama")[0], "smop", length=1000).operators.values()
    told = frozen(NUMBERS, "start")
    same_start(operator.prompts, told["prompts"])
    torch.testing.assert_close(operator.router @ operator.router.T, torch.tensor(told["router"]), rtol=0, atol=1e-5)


@against("authors", "smop", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """How many numbers of the prompts, and of the router."""
    model = host("llama")[0]
    injection = peftcore.apply(model, "smop")
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in injection.parameters()}
    (operator,) = injection.operators.values()
    found = [operator.prompts.numel(), operator.router.numel()]
    assert found == frozen(NUMBERS, "trains") and len(list(injection.parameters())) == 2


@against("authors", "smop", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    same_defaults(peftcore.apply(host("llama")[0], "smop").config, frozen(NUMBERS, "defaults"))


def test_count() -> None:
    model, _ = host("llama")
    injection = peftcore.apply(model, "smop")
    assert sum(p.numel() for p in injection.parameters()) == 4 * 5 * 16 + 4 * 16


def test_what_it_refuses() -> None:
    model, _ = host("t5")
    with pytest.raises(ConfigError, match="top_k=5 is larger than prompts=4"):
        peftcore.apply(model, "smop", top_k=5)
    with pytest.raises(UnsupportedSite, match="target the encoder"):
        peftcore.apply(model, "smop", target="decoder")
    assert not peftcore.injections(model)
