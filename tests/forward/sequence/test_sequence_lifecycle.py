"""Rows in front under compilers, checkpointing, low precision, and as guests of the host."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from sequence_toys import Rows, adapt, host, padded, tokens
from torch import Tensor, nn
from transformers import StaticCache

import peftcore


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def inputs_of(name: str) -> dict[str, Any]:
    ids = tokens()
    given = {"input_ids": ids, "attention_mask": padded(torch.ones_like(ids), right=2)}
    if name in ("t5", "bart"):
        given["decoder_input_ids"] = tokens(length=4, seed=2)
    return given


COMPILED = ["llama", "gpt2", "short_mistral", "hybrid", "bert_cls", "roberta", "t5", "bart"]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_without_a_break(name: str) -> None:
    """Also with the cache that a model makes by default."""
    model, _ = host(name)
    _, _, rows = adapt(model)
    given = inputs_of(name)
    expected = model(**given).logits
    (gradient,) = torch.autograd.grad(expected.square().sum(), rows)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    output = compiled(**given)
    close(output.logits, expected)
    (again,) = torch.autograd.grad(output.logits.square().sum(), rows)
    torch.testing.assert_close(again, gradient, rtol=1e-8, atol=1e-8)
    if output.get("past_key_values") is not None and name not in ("t5", "bart"):
        assert output.past_key_values.get_seq_length() == 6


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "hybrid"])
def test_compiled_decoding_steps(name: str) -> None:
    """A static cache that holds the rows, in a step compiled without a break, twice with one graph."""
    model, _ = host(name)
    adapt(model)
    ids = tokens(length=9)
    expected = model(input_ids=ids, use_cache=False).logits
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(input_ids=ids[:, :7], past_key_values=cache)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for at in (7, 8):
        places = torch.full((2, 1), at)
        output = compiled(input_ids=ids[:, at : at + 1], past_key_values=cache, position_ids=places)
        close(output.logits[:, 0], expected[:, at])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert_cls", "t5", "bart"])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    """The rows require gradients, so the reentrant kind needs no help."""
    model, _ = host(name)
    _, _, rows = adapt(model)
    for module in model.modules():
        module.__dict__.update(
            {key: 0.0 for key in vars(module) if "dropout" in key and isinstance(vars(module)[key], float)}
        )
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    given = inputs_of(name)
    (expected,) = torch.autograd.grad(model.train()(**given).logits.square().sum(), rows)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(**given).logits.square().sum().backward()
    assert expected.abs().max() > 0
    close(rows.grad, expected)


def test_low_precision() -> None:
    model, _ = host("llama")
    exact = copy.deepcopy(model)
    peftcore.apply(exact, Rows, dtype="float64", seed=1)
    model.to(torch.bfloat16)
    peftcore.apply(model, Rows, seed=1)
    ids = tokens()
    output = model(input_ids=ids).logits
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.double(), exact(input_ids=ids).logits, rtol=0.1, atol=0.1)
    given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        model.generate(ids, cache_implementation="static", **given)[:, :7], model.generate(ids, **given)[:, :7]
    )


@pytest.mark.parametrize("name", ["llama", "bert_cls", "clip", "t5"])
def test_copies_pickles_and_the_way_out(name: str) -> None:
    model, inputs = host(name)
    key = "logits_per_image" if name == "clip" else "logits"
    before = {path: (type(module), sorted(vars(module))) for path, module in model.named_modules()}
    bare = model(**inputs)[key]
    _, injection, _ = adapt(model)
    output = model(**inputs)[key]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(**inputs)[key], output)
        (mine,) = peftcore.injections(twin).values()
        with mine.disabled():
            assert torch.equal(twin(**inputs)[key], bare)
    injection.check()
    injection.remove()
    assert {path: (type(module), sorted(vars(module))) for path, module in model.named_modules()} == before
    assert torch.equal(model(**inputs)[key], bare)


def test_saved_and_loaded(tmp_path: Any) -> None:
    model, _ = host("t5")
    base, injection, _ = adapt(model)
    given = inputs_of("t5")
    injection.save(tmp_path / "rows")
    peftcore.register(Rows)
    peftcore.load(base, tmp_path / "rows")
    assert torch.equal(base(**given).logits, model(**given).logits)


def test_planned_as_applied() -> None:
    model, _ = host("clip")
    plan = peftcore.plan(model, Rows)
    assert [site.path for site in plan.sites] == ["text_model:sequence"]
    injection = peftcore.apply(model, Rows)
    assert {key: value.shape for key, value in injection.state_dict().items()} == plan.shapes
    assert plan.trainable == 3 * 48
