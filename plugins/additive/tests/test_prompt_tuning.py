"""Prompt tuning: the authors' rows and draws; the other implementation with the same prompt, where it stands, how it
starts.

(The other implementation is compared in a plain forward: its `generate` gives wrong text with the transformers versions
that this project is for. What it is compared with there stands in tests/forward/sequence/test_sequence.py.)"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.errors import ConfigError, NotMergeable, UnsupportedSite
from peftcore.testing import against, check_method, conformance, frozen, same_defaults
from peftcore.testing.hosts import HOSTS
from peftcore.testing.kit import fill

peft = pytest.importorskip("peft")
LENGTH = 4


@conformance("prompt_tuning", options={"gpt2": {"length": 4}})  # a table of 32 positions: 20 rows do not fit often
def test_conformance(check: Callable[[], None]) -> None:
    check()


def host(name: str) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, inputs = HOSTS[name].build()
    if name == "moe":
        model.set_experts_implementation("eager")  # grouped products of torch have no float64
    return model.double().eval().requires_grad_(False), inputs


def prompted(model: nn.Module, **options: Any) -> tuple[peftcore.Injection, Tensor]:
    injection = peftcore.apply(model, "prompt_tuning", length=LENGTH, dtype="float64", **options)
    fill(injection)
    (operator,) = injection.operators.values()
    return injection, operator.prompt


@pytest.mark.parametrize("name", ["llama", "gpt2", "moe", "t5"])
@against("peft 0.21", "prompt_tuning")
def test_the_other_implementation_with_the_same_prompt(name: str) -> None:
    model, inputs = host(name)
    base = deepcopy(model)
    _, prompt = prompted(model)
    task = "SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM"
    other = (
        peft.get_peft_model(base, peft.PromptTuningConfig(task_type=task, num_virtual_tokens=LENGTH)).double().eval()
    )
    table = other.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        table[:LENGTH] = prompt  # for both halves of an encoder-decoder it makes rows, and uses the encoder's
    ours, theirs = model(**inputs).logits, other(**inputs).logits
    theirs = theirs if name == "t5" else theirs[:, LENGTH:]
    alone = base(**inputs).logits if name != "t5" else HOSTS[name].output(deepcopy(host(name)[0])(**inputs))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert (ours - alone).abs().max() > 1e-3
    direction = torch.randn_like(ours)
    for output in (ours, theirs):
        (output * direction).sum().backward()
    assert table.grad is not None and table.grad.abs().max() > 0
    torch.testing.assert_close(prompt.grad, table.grad[:LENGTH], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "place"),
    [("llama", "model"), ("gpt2", "transformer"), ("bert", "bert"), ("t5", "encoder"), ("moe", "model")],
)
def test_it_stands_at_the_stack(name: str, place: str) -> None:
    model, _ = host(name)
    injection = peftcore.apply(model, "prompt_tuning")
    assert list(injection.operators) == [f"{place}:sequence"]
    assert sum(p.numel() for p in injection.parameters()) == 20 * 16
    assert list(injection.state_dict()) == [f"{place}:sequence.prompt"]


def test_it_starts_from_rows_of_the_table() -> None:
    model, _ = host("llama")
    table = model.model.embed_tokens.weight
    injection = peftcore.apply(model, "prompt_tuning", length=30, seed=1, dtype="float64")
    prompt = injection.operators["model:sequence"].prompt
    where = (prompt[:, None] == table[None]).all(-1)
    assert where.any(1).all()
    assert len(where.nonzero()[:, 1].unique()) > 10  # drawn, not counted off


AUTHORS = Path(__file__).parent / "numbers" / "prompt_tuning.json"
CODE = {"repository": "google-research/prompt-tuning", "commit": "72285ee", "script": "prompt_tuning/train/prompts.py"}


@pytest.mark.parametrize("name", ["llama", "t5"])
@against("authors", "prompt_tuning", **CODE)
def test_the_rows_of_the_authors(name: str) -> None:
    """The host reads what their module puts together."""
    model, inputs = host(name)
    script = run_path(str(AUTHORS.with_suffix(".py")))
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(script["wave"]((script["VOCABULARY"], script["WIDTH"]), 0.29))
    base = deepcopy(model)
    injection = peftcore.apply(model, "prompt_tuning", length=script["LENGTH"], dtype="float64")
    (operator,) = injection.operators.values()
    with torch.no_grad():
        operator.prompt.copy_(script["wave"]((script["LENGTH"], script["WIDTH"]), 0.41))
    rows = torch.tensor(frozen(AUTHORS)["rows"], dtype=torch.float64).view(2, -1, script["WIDTH"])
    more = {"decoder_input_ids": inputs["decoder_input_ids"]} if name == "t5" else {}
    ours = model(input_ids=torch.tensor(script["IDS"]), **more).logits
    theirs = base(inputs_embeds=rows, **more).logits
    assert (ours - base(input_ids=torch.tensor(script["IDS"]), **more).logits).abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs if name == "t5" else theirs[:, LENGTH:], rtol=1e-10, atol=1e-10)


@against("authors", "prompt_tuning", **CODE, part="start")
def test_no_token_is_drawn_twice_where_there_are_enough() -> None:
    model, _ = host("llama")
    table = model.get_input_embeddings().weight
    expected = frozen(AUTHORS, "start")["drawn"]
    for length, drawn in ((len(table), expected), (3 * len(table), None)):
        injection = peftcore.apply(model, "prompt_tuning", length=length, dtype="float64", name=str(length))
        (operator,) = injection.operators.values()
        found = (operator.prompt[:, None] == table[None]).all(-1)
        assert found.any(1).all()
        if drawn is not None:
            assert len(table) == drawn == found.any(0).sum()


@against("authors", "prompt_tuning", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """The one tensor of the prompt, in the encoder of a T5."""
    model, _ = host("t5")
    injection = peftcore.apply(model, "prompt_tuning")
    assert frozen(AUTHORS, "trains") == ["encoder/prompt/prompt/prompt"]
    own = {id(each) for each in injection.operators["encoder:sequence"].parameters()}
    assert {id(each) for each in model.parameters() if each.requires_grad} == own
    assert list(injection.state_dict()) == ["encoder:sequence.prompt"]


@against("authors", "prompt_tuning", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    config, short = peftcore.apply(host("llama")[0], "prompt_tuning").config, "the paper gains little beyond 20 rows"
    same_defaults(config, frozen(AUTHORS, "defaults"), otherwise={"length": short})


def test_it_starts_from_given_tokens_repeated_or_cut() -> None:
    model, _ = host("llama")
    table = model.model.embed_tokens.weight
    for length, ids in ((5, [7, 3, 7, 3, 7]), (1, [7])):
        name = f"rows{length}"
        injection = peftcore.apply(model, "prompt_tuning", name=name, length=length, init_ids=[7, 3], dtype="float64")
        assert torch.equal(injection.operators["model:sequence"].prompt, table[torch.tensor(ids)])


def test_embeddings_that_are_scaled_start_it_scaled() -> None:
    """It stands behind the scaling."""
    import transformers

    config = transformers.Gemma3TextConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    model = transformers.Gemma3ForCausalLM(config).eval()
    injection = peftcore.apply(model, "prompt_tuning", length=2, init_ids=[7, 3])
    expected = model.model.embed_tokens(torch.tensor([7, 3]))
    assert torch.equal(injection.operators["model:sequence"].prompt, expected)
    assert torch.allclose(expected, model.model.embed_tokens.weight[[7, 3]] * 4)


def test_it_starts_uniform() -> None:
    model, _ = host("llama")
    prompt = peftcore.apply(model, "prompt_tuning", length=200, init="uniform").operators["model:sequence"].prompt
    assert prompt.min() >= -0.5 and prompt.max() <= 0.5 and prompt.std() > 0.25
    assert prompt.mean().abs() < 0.05


def test_tokens_outside_of_the_vocabulary_are_refused() -> None:
    model, _ = host("llama")
    with pytest.raises(ConfigError, match="40"):
        peftcore.apply(model, "prompt_tuning", init_ids=[3, 40])
    assert not peftcore.injections(model)


def test_a_decoder_can_be_prompted_instead() -> None:
    model, inputs = host("t5")
    injection, _ = prompted(model, target="decoder")
    assert list(injection.operators) == ["decoder:sequence"]
    assert model(**inputs).logits.shape[1] == inputs["decoder_input_ids"].shape[1]


@pytest.mark.parametrize("embedded", [False, True])
def test_behind_the_embeddings_it_has_no_positions(embedded: bool) -> None:
    """The equation a second time: rows in front of what BERT's embeddings return, with a mask that shows them."""
    model, _ = host("bert")
    base = deepcopy(model)
    _, prompt = prompted(model, behind_embeddings=True)
    other = prompt.detach().clone().requires_grad_()
    ids, mask = (
        torch.tensor([[5, 6, 7, 8], [9, 3, 0, 0], [0, 2, 3, 4]]),
        torch.tensor([[1] * 4, [1, 1, 0, 0], [0, 1, 1, 1]]),
    )
    inputs = {"inputs_embeds": base.bert.embeddings.word_embeddings(ids)} if embedded else {"input_ids": ids}
    ours = model.bert(**inputs, attention_mask=mask).last_hidden_state
    alone = base.bert(**inputs, attention_mask=mask).last_hidden_state
    base.bert.embeddings.register_forward_hook(lambda module, args, y: torch.cat([other.expand(3, -1, -1), y], 1))
    longer = torch.cat([torch.ones(3, LENGTH, dtype=torch.long), mask], 1)
    theirs = base.bert(**inputs, attention_mask=longer).last_hidden_state[:, LENGTH:]
    real = mask.bool()
    torch.testing.assert_close(ours[real], theirs[real], rtol=1e-10, atol=1e-10)
    assert (ours - alone)[real].abs().max() > 1e-3
    direction = torch.randn_like(ours) * mask[..., None]
    for output in (ours, theirs):
        (output * direction).sum().backward()
    assert prompt.grad.abs().max() > 0
    torch.testing.assert_close(prompt.grad, other.grad, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_behind_embeddings_stand_encoders_alone(name: str) -> None:
    model, _ = host(name)
    with pytest.raises(UnsupportedSite, match="cannot insert rows without positions after its embeddings"):
        peftcore.apply(model, "prompt_tuning", behind_embeddings=True)
    assert not peftcore.injections(model)


def test_what_it_cannot_do() -> None:
    with pytest.raises(UnsupportedSite, match="not a stack of tokens"):
        peftcore.apply(nn.Sequential(nn.Linear(4, 4)), "prompt_tuning", target="0")
    model, _ = host("llama")
    injection, _ = prompted(model)
    with pytest.raises(NotMergeable):
        injection.merge()


def wave(shape: tuple[int, ...], k: float) -> Tensor:
    size = torch.Size(shape).numel()
    return torch.sin(torch.arange(size, dtype=torch.float64) * k + k).view(shape)


NUMBERS = Path(__file__).parent / "numbers" / "dpt_lowrank.json"


@against("others", "prompt_tuning", repository="XYaoooo/DPT", commit="8f98d1e", script="modeling_t5.py")
def test_a_prompt_of_a_rank_is_that_of_its_authors() -> None:
    """The rows and the gradients of both factors; the encoder gets these rows in front of its tokens."""
    model, inputs = host("t5")
    base, numbers = deepcopy(model), frozen(NUMBERS)
    injection = peftcore.apply(model, "dpt_lowrank", length=LENGTH, rank=3, dtype="float64")
    (operator,) = injection.operators.values()
    with torch.no_grad():
        operator.A.copy_(wave((LENGTH, 3), 0.37))
        operator.B.copy_(wave((3, 16), 0.29))
    rows = operator.rows(operator.A)
    expected = torch.tensor(numbers["rows"], dtype=torch.float64).view(2, LENGTH, 16)
    torch.testing.assert_close(rows.expand(2, -1, -1), expected, rtol=1e-10, atol=1e-10)
    (rows.expand(2, -1, -1) * wave((2, LENGTH, 16), 0.23)).sum().backward()
    for name in ("A", "B"):
        assert getattr(operator, name).grad.flatten().tolist() == pytest.approx(numbers[name], abs=1e-10)
    ids, mask = inputs["input_ids"], inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    embeds = torch.cat([expected[:1].expand(len(ids), -1, -1), base.shared(ids)], dim=1)
    longer = torch.cat([mask.new_ones(len(ids), LENGTH), mask], dim=1)
    theirs = base(inputs_embeds=embeds, attention_mask=longer, decoder_input_ids=inputs["decoder_input_ids"]).logits
    torch.testing.assert_close(model(**inputs).logits, theirs, rtol=1e-10, atol=1e-10)


def test_factors_start_as_those_of_the_authors() -> None:
    model, _ = host("llama")
    injection = peftcore.apply(model, "prompt_tuning", length=500, init="uniform", rank=500)
    (operator,) = injection.operators.values()
    ends = [round(float(end), 2) for each in (operator.A, operator.B) for end in (each.min(), each.max())]
    assert ends == frozen(NUMBERS)["ends"] == [-0.5, 0.5, -0.5, 0.5]
    assert all(abs(float(each.detach().std()) - 12**-0.5) < 0.01 for each in (operator.A, operator.B))
    assert sum(p.numel() for p in injection.parameters()) == 500 * (500 + 16)


def test_the_preset_has_the_rank_of_the_authors() -> None:
    model, _ = host("llama")
    injection = peftcore.apply(model, "dpt_lowrank")
    assert sum(p.numel() for p in injection.parameters()) == 10 * (100 + 16)


@pytest.mark.parametrize("options", [{}, {"init": "uniform", "init_ids": [3]}])
def test_factors_of_tokens_are_refused(options: dict[str, Any]) -> None:
    model, _ = host("llama")
    with pytest.raises(ConfigError, match="starts its factors uniform"):
        peftcore.apply(model, "prompt_tuning", rank=2, **options)
    assert not peftcore.injections(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_the_kit_holds_for_a_rank(name: str) -> None:
    options = {"length": LENGTH, "init": "uniform", "rank": 2}
    results = check_method("prompt_tuning", hosts=[name], options={name: options})
    failed = [str(result) for result in results if result.status == "failed"]
    assert results and not failed, failed
