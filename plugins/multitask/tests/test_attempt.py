"""ATTEMPT: the kit; rows and gradients of the authors' encoder; the host run on embeddings that begin with the mixture;
sources out of files; generation, where a text keeps its mixture."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftcore
from peftcore.errors import ConfigError, MissingContext, NotMergeable, UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.hosts import HOSTS
from peftcore.testing.kit import fill
from peftcore_multitask import gather

NUMBERS = Path(__file__).parent / "numbers" / "attempt.json"
LENGTH = 3
SOURCE = {"method": "prompt_tuning", "length": LENGTH}
OPTIONS: dict[str, Any] = {"parts": [SOURCE] * 2, "hidden": 5}


# Generation without a cache has to be told where the text ends.
@conformance(
    "attempt", options={"*": {**OPTIONS, "tasks": 2, "task": 1}}, context=lambda model, picture: {"prompt_length": 3}
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def wave(*shape: int, step: float) -> Tensor:
    return (torch.arange(math.prod(shape), dtype=torch.float64) * step + step).sin().view(shape)


def host(name: str) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, inputs = HOSTS[name].build()
    return model.double().eval().requires_grad_(False), inputs


def narrow(width: int = 6) -> Any:
    """A model as wide as the authors' encoder there."""
    import transformers

    sizes = {"hidden_size": width, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.BertModel(transformers.BertConfig(vocab_size=10, **sizes), add_pooling_layer=False)


AUTHORS = {"repository": "AkariAsai/ATTEMPT", "commit": "b5121e5"}
AUTHORS["script"] = "attempt/third_party/models/t5/modeling_t5.py"
TRAINED = {"prefix_shared": "prompt", "encoder.attn_W_down.weight": "down.weight"}
TRAINED |= {"encoder.attn_W_up.weight": "up.weight"}


@against("authors", "attempt", **AUTHORS)
def test_the_authors_numbers() -> None:
    """Rows of two texts of two tasks, and gradients of all tensors and of the embedded texts."""
    options = {**OPTIONS, "hidden": 100, "tasks": 2, "temperature": 1.5, "train_norm": True}
    injection = peftcore.apply(narrow(), "attempt", **options, train_parts=True, dtype="float64")
    (operator,) = injection.operators.values()
    op: Any = operator.train()
    sources = [part.prompt for part in op.parts.values()]
    with torch.no_grad():
        op.prompt.copy_(wave(2, LENGTH, 6, step=0.41))
        for one, value in zip(sources, wave(2, LENGTH, 6, step=0.53), strict=True):
            one.copy_(value)
        op.down.weight.copy_(wave(100, 6, step=0.37))
        op.up.weight.copy_(wave(6, 100, step=0.31))
        op.norm.weight.copy_(1 + 0.3 * wave(6, step=0.7))
        op.norm.bias.copy_(0.3 * wave(6, step=0.9))
    table = wave(10, 6, step=0.29).requires_grad_()
    embeds = table[torch.tensor([[5, 1, 3, 8], [2, 9, 4, 0]])]
    op.tasks.of_rows = lambda prompts, rows: prompts[[1, 0]]
    rows = op.rows_of(embeds, torch.ones(2, 4).bool())
    (rows * wave(2, LENGTH, 6, step=0.23)).sum().backward()
    found = {"rows": rows, "embeddings": table.grad, "prompts": op.prompt.grad}
    found |= {"sources": torch.stack([each.grad for each in sources])}
    found |= {"down": op.down.weight.grad, "up": op.up.weight.grad}
    found |= {"weight": op.norm.weight.grad, "bias": op.norm.bias.grad}
    numbers = frozen(NUMBERS)
    assert numbers.keys() == found.keys()
    for name, value in numbers.items():
        assert max(map(abs, value)) > 1e-3, name
        assert found[name].flatten().tolist() == pytest.approx(value, rel=1e-9, abs=1e-10), name


@pytest.mark.parametrize("tasks", [1, 2])
@against("authors", "attempt", **AUTHORS, part="start")
def test_prompts_start_as_the_authors(tasks: int, tmp_path: Path) -> None:
    """Those of tasks start as the first source: of files too."""
    for seed in range(3):
        other, _ = host("llama")
        source = peftcore.apply(other, "prompt_tuning", length=LENGTH, name=f"p{seed}", dtype="float64", seed=seed)
        source.save(tmp_path / f"p{seed}")
    fresh, files = host("llama")[0], {tmp_path / f"p{seed}": 1.0 + seed for seed in range(3)}
    for injection in (
        peftcore.apply(fresh, "attempt", **OPTIONS, tasks=tasks, dtype="float64"),
        gather(host("llama")[0], "attempt", files, tasks=tasks),
    ):
        (operator,) = injection.operators.values()
        op: Any = operator
        first = op.parts[str(frozen(NUMBERS, "start")["source"][tasks - 1])].prompt
        assert torch.equal(op.prompt, first.expand_as(op.prompt)) and first.abs().max() > 0


@against("authors", "attempt", **AUTHORS, part="start")
def test_the_network_starts_as_the_authors() -> None:
    (operator,) = peftcore.apply(narrow(400), "attempt").operators.values()
    op: Any = operator
    for name in ("down", "up"):
        same_start(getattr(op, name).weight, frozen(NUMBERS, "start")[name])


@against("authors", "attempt", **AUTHORS, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """The network and the prompts of the tasks."""
    injection = peftcore.apply(narrow(), "attempt", **OPTIONS)
    (operator,) = injection.operators.values()
    trains = {name for name, each in operator.named_parameters() if each.requires_grad}
    assert trains == {TRAINED[name] for name in frozen(NUMBERS, "trains")}


@against("authors", "attempt", **AUTHORS, part="defaults")
def test_defaults_are_the_authors() -> None:
    otherwise = {"temperature": "2087 is e times the width of T5-base, and None takes e times any width"}
    same_defaults(peftcore.apply(narrow(), "attempt").config, frozen(NUMBERS, "defaults"), otherwise=otherwise)


def outputs(name: str, model: Any, **inputs: Tensor) -> Tensor:
    """The states of each token in BERT, which here answers for the whole text; logits elsewhere."""
    found: Tensor = model.bert(**inputs)[0] if name == "bert" else model(**inputs).logits
    return found


IDS = torch.tensor([[5, 6, 7, 8], [9, 3, 4, 1], [12, 2, 3, 1]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])


@pytest.mark.parametrize("name", ["t5", "bert", "llama"])
def test_the_host_on_embeddings_that_begin_with_the_mixture(name: str) -> None:
    """Text by text, each with its task; padding has no part in a mixture; the report has the shares."""
    model, _ = host(name)
    base = deepcopy(model)
    options = {"tasks": 2, "weights": [1.0, -2.0], "temperature": 0.5, "train_norm": True}
    injection = peftcore.apply(model, "attempt", **OPTIONS, **options, dtype="float64")
    fill(injection, 3)
    (operator,) = injection.operators.values()
    op: Any = operator
    with torch.no_grad():
        for each in (op.prompt, *(part.prompt for part in op.parts.values())):
            each.normal_()
    more = {"decoder_input_ids": IDS[:, :2]} if name == "t5" else {}
    with peftcore.call(model, task=[1, 0, 1]), injection.reporting():
        ours = outputs(name, model, input_ids=IDS, attention_mask=MASK, **more)
    sums = torch.zeros(3, dtype=torch.float64)
    for index, (count, task) in enumerate(((4, 1), (2, 0), (3, 1))):
        words = base.get_input_embeddings()(IDS[index : index + 1, :count])
        every = [op.parts["0"].prompt, -2 * op.parts["1"].prompt, op.prompt[task]]
        hidden = op.down.weight @ words[0].max(0).values
        sought = op.up.weight @ (hidden * hidden.sigmoid())
        sought = (sought - sought.mean()) / (sought.var(correction=0) + 1e-5).sqrt() * op.norm.weight + op.norm.bias
        scores = torch.stack([each.max(0).values @ sought / 0.5 for each in every])
        shares = scores.exp() / scores.exp().sum()
        sums += shares.detach()
        rows = op.prompt[task] + sum(share * each for share, each in zip(shares, every, strict=True))
        some = {key: value[index : index + 1] for key, value in more.items()}
        theirs = outputs(name, base, inputs_embeds=torch.cat([rows[None], words], 1), **some)[0]
        if name != "t5":
            theirs = theirs[LENGTH:]
        torch.testing.assert_close(ours[index, : len(theirs)], theirs, rtol=1e-9, atol=1e-9)
    (row,) = injection.report().routers
    assert row.routes == "sequence" and row.choices == 3
    assert row.shares == pytest.approx((sums / 3).tolist(), rel=1e-9) and max(row.shares) - min(row.shares) > 0.005


def test_sources_out_of_files(tmp_path: Path) -> None:
    """They stay as they are; the task's prompt and the network train, are saved and come back."""
    for seed in range(2):
        other, inputs = host("llama")
        trained = peftcore.apply(other, "prompt_tuning", length=LENGTH, name=f"p{seed}", dtype="float64")
        fill(trained, seed)
        trained.save(tmp_path / f"p{seed}")
    model, inputs = host("llama")
    injection = gather(model, "attempt", {tmp_path / f"p{seed}": 1.0 for seed in range(2)}, tasks=2, task=0)
    injection.trainable()
    (operator,) = injection.operators.values()
    assert not any(each.requires_grad for each in injection.parts["1"].parameters())
    fresh, _ = host("llama")
    source = next(iter(peftcore.load(fresh, tmp_path / "p1").operators.values()))
    assert torch.equal(operator.parts["1"].prompt, source.prompt)  # type: ignore[index]
    with torch.no_grad():
        operator.prompt.normal_()
    injection.save(tmp_path / "mixed")
    again, _ = host("llama")
    peftcore.load(again, tmp_path / "mixed")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)
    with pytest.raises(NotMergeable):
        injection.merge()


def test_a_generated_token_changes_no_mixture() -> None:
    model, inputs = host("llama")
    fill(peftcore.apply(model, "attempt", **OPTIONS, tasks=2, temperature=0.1, dtype="float64"))
    ids = inputs["input_ids"]
    given = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
    with peftcore.call(model, task=[1, 0]):
        cached = model.generate(ids, **given, use_cache=True)
    with peftcore.call(model, task=[1, 0], prompt_length=ids.shape[1]):
        assert torch.equal(cached, model.generate(ids, **given, use_cache=False))


def test_start_and_count() -> None:
    model, _ = host("llama")
    injection = peftcore.apply(model, "attempt", tasks=3)
    (operator,) = injection.operators.values()
    op: Any = operator
    assert len(op.parts) == 6 and op.length == 100 and op.temperature == math.e * 16
    table = model.get_input_embeddings().weight.float()
    assert all(any(torch.equal(row, word) for word in table) for row in op.prompt[2])
    trained = sum(p.numel() for p in injection.parameters() if p.requires_grad)
    assert trained == 3 * 100 * 16 + 200 * 16
    peftcore.apply(model, "attempt", tasks=3, train_norm=True, name="other")
    assert peftcore.injections(model)["other"].summary().trainable == trained + 2 * 16


def test_counts_that_the_paper_prints() -> None:
    """On T5-base: 232K for one task, and 96K a task for the eight of GLUE, which share the network; with the norm."""
    import transformers

    sizes = {"d_ff": 8, "d_kv": 4, "num_heads": 2, "num_layers": 1, "vocab_size": 120}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(d_model=768, **sizes))
    for tasks, printed in ((1, 232), (8, 96)):
        injection = peftcore.apply(model, "attempt", tasks=tasks, train_norm=True)
        assert round(injection.summary().trainable / tasks / 1000) == printed
        injection.remove()


def test_what_it_refuses() -> None:
    model, inputs = host("llama")
    for parts, words in (
        ([{"method": "lora"}], "'lora' cannot be a part of attempt"),
        ([SOURCE, {**SOURCE, "length": 4}], r"lengths \[3, 4\] cannot be added"),
    ):
        with pytest.raises(ConfigError, match=words):
            peftcore.apply(model, "attempt", parts=parts)
    with pytest.raises(UnsupportedSite, match="remove length from the parts' overrides"):
        peftcore.apply(model, "attempt", parts=[SOURCE, {**SOURCE, "overrides": {"*": {"length": 2}}}])
    with pytest.raises(UnsupportedSite, match="target the encoder"):
        peftcore.apply(host("t5")[0], "attempt", **OPTIONS, target="decoder")
    assert not peftcore.injections(model)
    peftcore.apply(model, "attempt", **OPTIONS, tasks=2)
    with pytest.raises(MissingContext, match="needs the task"):
        model(**inputs)
