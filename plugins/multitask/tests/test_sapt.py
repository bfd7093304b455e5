"""SAPT: the kit; shares, updates, the loss and gradients of the authors' code; the host with merged weights, text by
text; generation, where a text keeps its shares; what trains, and how tasks are added; the loss in training; counts and
what is refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import peftcore
from peftcore.errors import ConfigError, MissingContext, NotMergeable, SequenceError, UnsupportedSite
from peftcore.testing import HOSTS, against, conformance, frozen, same_defaults, same_start
from peftcore.testing.kit import fill
from peftcore_multitask.sapt import divergence, take_tasks

NUMBERS = Path(__file__).parent / "numbers" / "sapt.json"
CODE: Any = {"repository": "circle-hit/SAPT", "commit": "52a52b9", "script": "src/llama_prompt.py"}
OPTIONS: dict[str, Any] = {"tasks": 3, "rank": 2, "hidden": 5}
IDS = torch.tensor([[5, 6, 7, 8], [9, 3, 4, 1], [12, 2, 3, 1]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])


# Generation without a cache has to be told where the text ends.
@conformance("sapt", options={"*": OPTIONS}, context=lambda model, picture: {"prompt_length": 3})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def wave(*shape: int, step: float) -> Tensor:
    return (torch.arange(math.prod(shape), dtype=torch.float64) * step + step).sin().view(shape)


def llama() -> Any:
    torch.manual_seed(0)
    return HOSTS["llama"].build()[0].double().eval().requires_grad_(False)


def applied(model: Any, **options: Any) -> tuple[Any, Any, dict[str, Any]]:
    """An adapter moved by noise, keys and all; its attention; its other operators by path."""
    injection = peftcore.apply(model, "sapt", **{**OPTIONS, **options}, dtype="float64")
    fill(injection)
    others: dict[str, Any] = dict(injection.operators.items())
    attention = others.pop("model")
    with torch.no_grad():
        for key in attention.keys:
            key.normal_(0, 2)
    return injection, attention, others


@against("authors", "sapt", **CODE)
def test_numbers_of_the_authors() -> None:
    """Shares of two texts, what is added to one matrix, the loss of two replayed texts; and gradients of all that."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=10, **sizes))
    _, attention, others = applied(model)
    operator = others["model.layers.0.self_attn.q_proj"].train()
    table = wave(10, 8, step=0.29).requires_grad_()
    last: dict[str, Any] = {"key": attention.keys[2], "down": attention.down.weight, "up": attention.up.weight}
    last |= {"weight": attention.norm.weight, "bias": attention.norm.bias, "A": operator.A[2], "B": operator.B[2]}
    with torch.no_grad():
        for index, each in enumerate(last.values(), 1):
            each.copy_(wave(*each.shape, step=0.29 + 0.04 * index))
        for index, number in enumerate((1, 0)):  # theirs have the newest first
            attention.keys[number].copy_(wave(2, 8, step=0.43)[index])
            operator.A[number].copy_(wave(2, 8, step=0.67 + 0.04 * index))
            operator.B[number].copy_(wave(8, 2, step=0.81 + 0.04 * index))
    x = wave(2, 3, 8, step=0.37).requires_grad_()
    texts = table[torch.tensor([[5, 1, 3, 8], [2, 9, 4, 6]])], table[torch.tensor([[7, 7, 2, 0], [3, 5, 5, 8]])]
    every = torch.ones(2, 4, dtype=torch.bool)
    shares = attention.scores(texts[0], every).softmax(-1)
    added = operator.update(torch.zeros(2, 3, 8, dtype=torch.float64), x, shares.unsqueeze(1))
    logs = attention.scores(texts[1], every).log_softmax(-1)
    loss = divergence(torch.tensor([[0.7, 0.3, 0.0]] * 2, dtype=torch.float64), logs)
    ((added * wave(2, 3, 8, step=0.23)).sum() + loss).backward()
    found = {"shares": shares.flip(-1), "added": added, "loss": loss, "x": x.grad, "d words": table.grad}
    found |= {f"d {name}": each.grad for name, each in last.items()}
    numbers = frozen(NUMBERS)
    assert numbers.keys() == found.keys()
    for name, value in numbers.items():
        assert max(map(abs, value)) > 1e-2, name
        assert found[name].flatten().tolist() == pytest.approx(value, rel=1e-9, abs=1e-10), name


def narrow(width: int) -> Any:
    sizes = {"hidden_size": width, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    return transformers.LlamaModel(transformers.LlamaConfig(vocab_size=10, **sizes))


@against("authors", "sapt", **CODE, part="start")
def test_start_is_the_authors() -> None:
    told, injection = frozen(NUMBERS, "start"), peftcore.apply(narrow(2000), "sapt", rank=20, hidden=20)
    attention, *others = injection.operators.values()
    op: Any = attention
    same_start(torch.cat([*others[0].A]), told["A"])  # type: ignore[operator, misc]
    same_start(torch.cat([*others[0].B]), told["B"])  # type: ignore[operator, misc]
    for name in ("down", "up"):
        same_start(getattr(op, name).weight, told[name])
    for name in ("weight", "bias"):
        same_start(getattr(op.norm, name), told[name])
    many: Any = peftcore.apply(narrow(100), "sapt", tasks=400, rank=1, hidden=1).operators[""]
    same_start(torch.cat([*many.keys]), told["key"])


@against("authors", "sapt", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """For the last of three tasks."""
    found = dict.fromkeys(("A", "B", "keys", "network"), 0)
    for each in peftcore.apply(narrow(8), "sapt", **OPTIONS).operators.values():
        for name, value in each.named_parameters():
            if value.requires_grad:
                kind = name.partition(".")[0]
                found[kind if kind in found else "network"] += value.numel()
    assert found == frozen(NUMBERS, "trains")


@against("authors", "sapt", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    same_defaults(peftcore.apply(narrow(8), "sapt").config, frozen(NUMBERS, "defaults"))


def shares_of(base: Any, attention: Any, ids: Tensor) -> Tensor:
    """The shares of one text, from the equation."""
    largest = base.get_input_embeddings()(ids).max(0).values
    inner = attention.up.weight @ (attention.down.weight @ largest)
    inner = inner / (1 + (-inner).exp())
    sought = (inner - inner.mean()) / (inner.var(correction=0) + 1e-5).sqrt()
    sought = sought * attention.norm.weight + attention.norm.bias
    scores = torch.stack([(key * sought).sum() / 4 for key in attention.keys])  # the square root of 16
    return scores.exp() / scores.exp().sum()


def merged(base: Any, attention: Any, others: dict[str, Any], ids: Tensor) -> Any:
    """The host as it is to be for one text."""
    host, shares = copy.deepcopy(base), shares_of(base, attention, ids)
    with torch.no_grad():
        for path, each in others.items():
            weight = host.get_submodule(path).weight
            for share, A, B in zip(shares, each.A, each.B, strict=True):
                weight += 32 / 2 * share * B @ A
    return host


def test_the_host_with_merged_weights_text_by_text() -> None:
    """Padding has no part; nor has what stands behind the first label, or the text's end as it is told; the report has
    the shares."""
    model = llama()
    base = copy.deepcopy(model)
    injection, attention, others = applied(model)
    assert len(others) == 4
    with injection.reporting(), torch.no_grad():
        ours = model(input_ids=IDS, attention_mask=MASK).logits
    sums = torch.zeros(3, dtype=torch.float64)
    for row, count in enumerate(MASK.sum(1).tolist()):
        ids = IDS[row, :count]
        sums += shares_of(base, attention, ids).detach()
        theirs = merged(base, attention, others, ids)(ids[None]).logits[0]
        torch.testing.assert_close(ours[row, :count], theirs, rtol=1e-9, atol=1e-9)
    (report,) = injection.report().routers
    assert report.routes == "sequence" and report.choices == 3
    assert (
        report.shares == pytest.approx((sums / 3).tolist(), rel=1e-9) and max(report.shares) - min(report.shares) > 0.05
    )
    labels = IDS.masked_fill(torch.arange(4) < 2, -100)
    with peftcore.call(model, prompt_length=2), torch.no_grad():
        told = model(input_ids=IDS).logits
    with torch.no_grad():
        assert torch.equal(told, model(input_ids=IDS, labels=labels).logits)
    theirs = merged(base, attention, others, IDS[0, :2])(IDS[:1]).logits
    torch.testing.assert_close(told[:1], theirs, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        words = model.get_input_embeddings()(IDS)
        torch.testing.assert_close(model(inputs_embeds=words).logits, model(input_ids=IDS).logits)


def test_a_generated_token_changes_no_shares() -> None:
    model = llama()
    base = copy.deepcopy(model)
    _, attention, others = applied(model)
    given = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    for beams in (1, 3):
        found = model.generate(IDS, **given, num_beams=beams, use_cache=True)
        for row, ids in enumerate(IDS):
            theirs = merged(base, attention, others, ids).generate(ids[None], **given, num_beams=beams, use_cache=True)
            assert torch.equal(found[row], theirs[0])
    with peftcore.call(model, prompt_length=4):
        assert torch.equal(found, model.generate(IDS, **given, num_beams=3, use_cache=False))
    assert not torch.equal(found, base.generate(IDS, **given, num_beams=3, use_cache=True))
    with torch.no_grad():
        cache = base(IDS, use_cache=True).past_key_values
        with pytest.raises(SequenceError, match="filled without this adapter"):
            model(IDS[:, :1], past_key_values=cache)
        cache = model(IDS, use_cache=True).past_key_values
        with pytest.raises(MissingContext, match="belong to the prompt or to the answer"):
            model(IDS[:, :2], past_key_values=cache)


def test_the_next_task(tmp_path: Path) -> None:
    """It begins with what the tasks before have, of which only the network that reads texts goes on training."""
    model = llama()
    first, _, _ = applied(model, tasks=1, name="first")
    first.save(tmp_path / "first")
    second = peftcore.apply(model, "sapt", **{**OPTIONS, "tasks": 2}, name="second", dtype="float64")
    take_tasks(second, first)
    first.remove()
    values = {f"{path}.{name}": p for path, op in second.operators.items() for name, p in op.named_parameters()}
    trains = {name for name, p in values.items() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in values.keys() - trains} == {"0"}
    assert {name for name in trains if name.rpartition(".")[2] in "01"} == {
        name[:-1] + "1" for name in values.keys() - trains
    }
    assert {name for name in trains if name.startswith("model.") and "layers" not in name} == {
        f"model.{name}" for name in ("keys.1", "down.weight", "up.weight", "norm.weight", "norm.bias")
    }
    other = peftcore.load(llama(), tmp_path / "first")
    for path, op in other.operators.items():
        for name, value in op.named_parameters():
            assert torch.equal(values[f"{path}.{name}"], value) and value.any(), name
    for wrong in ({"tasks": 2, "rank": 3}, {"tasks": 1, "target": "attn.q"}):
        third = peftcore.apply(model, "sapt", **{**OPTIONS, **wrong}, name="third")
        with pytest.raises(ConfigError, match="take_tasks"):
            take_tasks(third, second)
        third.remove()
    with pytest.raises(NotMergeable):
        second.merge()


def test_told_shares_are_kept() -> None:
    """By a loss of the rows that have some, in training."""
    model = llama()
    base = copy.deepcopy(model)
    injection, attention, _ = applied(model, replay=0.5)
    told = torch.tensor([[0.0, 0.0, 0.0], [0.25, 0.75, 0.0], [0.1, 0.2, 0.7]])
    with peftcore.call(model, attention=told):
        model(IDS)
        assert injection.losses() == 0
        model.train()
        model(IDS)
        expected = 0.0
        for row in (1, 2):
            for target, share in zip(told[row].tolist(), shares_of(base, attention, IDS[row]).tolist(), strict=True):
                expected += 0.25 * target * (math.log(target) - math.log(share)) if target else 0.0
        loss = injection.losses()
        assert loss.item() == pytest.approx(expected, rel=1e-6)
        loss.backward()
        assert attention.down.weight.grad.any() and attention.keys[2].grad.any()
    with peftcore.call(model, attention=told[:, :2]), pytest.raises(ConfigError, match="pass target shares"):
        model(IDS)


def test_start_count_and_what_it_refuses() -> None:
    model = llama()
    with torch.no_grad():
        before = model(IDS).logits
        injection: Any = peftcore.apply(model, "sapt", dtype="float64")
        assert torch.equal(model(IDS).logits, before)
    matrices = [model.get_submodule(path).weight.shape for path in injection.operators if path != "model"]
    assert injection.summary().trainable == 16 + 2 * 100 * 16 + 2 * 16 + 4 * sum(map(sum, matrices))
    injection.remove()
    with pytest.raises(UnsupportedSite, match="without a separate encoder"):
        peftcore.apply(HOSTS["t5"].build()[0], "sapt")
    with pytest.raises(UnsupportedSite, match="not a linear layer"):
        peftcore.apply(model, "sapt", target=["embed"])
    assert not peftcore.injections(model)
    peftcore.apply(model, "sapt", **OPTIONS)
    with pytest.raises(MissingContext, match="called by itself"):
        model.model.layers[0].self_attn.q_proj(torch.randn(1, 2, 16).double())
