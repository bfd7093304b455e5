"""DePT: the kit; logits, loss and gradients of the authors' fork of peft in a T5; texts longer and shorter than the
update, padding before them, generation; learning rates."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from prompted_hosts import outputs
from sines import wave

import peftcore
from peftcore.errors import ConfigError, SequenceError
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.hosts import HOSTS
from peftcore.testing.kit import fill

NUMBERS = Path(__file__).parent / "numbers" / "dept.json"
CODE: Any = {"repository": "ZhengxiangShi/DePT", "commit": "f0266a7", "script": "peft/peft_model.py"}
SMALL = {"length": 3, "rank": 4, "max_length": 6}


# Generation without a cache has to be told where the text ends.
@conformance("dept", options={"*": SMALL}, context=lambda model, picture: {"prompt_length": 3})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def host(name: str) -> Any:
    torch.manual_seed(0)
    model: Any = HOSTS[name].build()[0].double().eval().requires_grad_(False)
    return model


@against("authors", "dept", **CODE)
def test_the_authors_numbers() -> None:
    """Padded texts, as long as the update; the gradients are those of the loss of two answers."""
    model, numbers = host("t5"), frozen(NUMBERS)
    with torch.no_grad():
        for index, each in enumerate(model.parameters()):
            each.copy_(0.3 * wave(tuple(each.shape), 0.37 + 0.011 * index))
    injection = peftcore.apply(model, "dept", length=3, rank=2, max_length=5, dtype="float64")
    (operator,) = injection.operators.values()
    tensors = {"prompt": operator.prompt, "A": operator.A, "B": operator.B}
    with torch.no_grad():
        for index, each in enumerate(tensors.values()):
            each.copy_(0.5 * wave(tuple(each.shape), 0.41 + 0.13 * index))
    ids, mask = torch.tensor([[7, 9, 4, 2, 3], [5, 8, 1, 0, 0]]), torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    labels = torch.tensor([[4, 6, 1], [9, 1, 3]])
    decoder = torch.tensor([[0, 4, 6], [0, 9, 1]])
    output = model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder, labels=labels)
    output.loss.backward()
    assert output.logits.flatten().tolist() == pytest.approx(numbers["logits"], abs=1e-9)
    assert [output.loss.item()] == pytest.approx(numbers["loss"], abs=1e-10)
    for name, tensor in tensors.items():
        assert tensor.grad.abs().max() > 0
        assert tensor.grad.flatten().tolist() == pytest.approx(numbers[name], abs=1e-9), name


@pytest.mark.parametrize(
    ("name", "left"), [("bert", False), ("t5", False), ("llama", False), ("t5", True), ("llama", True)]
)
def test_equation(name: str, left: bool) -> None:
    """Each text of a batch by itself; one is longer than the update, one shorter, with padding on either side."""
    model = host(name)
    base = deepcopy(model)
    injection = peftcore.apply(model, "dept", length=3, rank=4, max_length=3, alpha=2.0, dtype="float64")
    fill(injection)
    (operator,) = injection.operators.values()
    ids, mask = torch.tensor([[5, 6, 7, 8, 4], [9, 3, 0, 0, 0]]), torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])
    if left:
        ids, mask = torch.stack([ids[0], ids[1].roll(3)]), mask.flip(1)
    more = {"decoder_input_ids": ids[:, -2:]} if name == "t5" else {}
    ours = outputs(name, model, input_ids=ids, attention_mask=mask, **more)
    for index, count in enumerate((5, 2)):
        own = ids[index, mask[index].bool()][None]
        words = base.get_input_embeddings()(own).clone()
        for place in range(min(count, 3)):
            words[0, place] += 2.0 / 4**0.5 * (operator.A[place] @ operator.B)
        some = {key: value[index : index + 1] for key, value in more.items()}
        expected = outputs(name, base, inputs_embeds=torch.cat([operator.prompt[None], words], 1), **some)[0]
        mine = ours[index] if name == "t5" else ours[index, mask[index].bool()]
        near = 1e-5 if left and name == "llama" else 1e-9  # it turns by places in float32
        torch.testing.assert_close(mine, expected if name == "t5" else expected[3:], rtol=near, atol=near)


def test_generated_tokens_get_nothing() -> None:
    model, ids = host("llama"), torch.tensor([[5, 6, 7]])
    fill(peftcore.apply(model, "dept", **SMALL, dtype="float64"))
    given = {"input_ids": ids, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached = model.generate(**given, use_cache=True)
    with peftcore.call(model, prompt_length=3):
        assert torch.equal(cached, model.generate(**given, use_cache=False))


@against("authors", "dept", **CODE, part="start")
def test_start_is_the_authors() -> None:
    """Of the factors; their prompt starts from words of the vocabulary, too."""
    injection = peftcore.apply(host("llama"), "dept", length=3, max_length=1000)
    (operator,) = injection.operators.values()
    told = frozen(NUMBERS, "start")
    same_start(operator.A, told["A"])
    same_start(operator.B, told["B"])


@against("authors", "dept", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    injection = peftcore.apply(host("t5"), "dept", length=3, rank=2, max_length=5)
    (operator,) = injection.operators.values()
    ours = {"embedding.weight": operator.prompt, "lora_embedding_A": operator.A, "lora_embedding_B": operator.B}
    told = frozen(NUMBERS, "trains")
    assert told == {f"prompt_encoder.default.{name}": tensor.numel() for name, tensor in ours.items()}
    assert sum(told.values()) == sum(value.numel() for value in injection.parameters())


@against("authors", "dept", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    same_defaults(peftcore.apply(host("llama"), "dept").config, frozen(NUMBERS, "defaults"))


def test_it_starts_from_words_and_adds_nothing() -> None:
    model = host("llama")
    injection = peftcore.apply(model, "dept", length=3, init_ids=[7, 3], dtype="float64")
    (operator,) = injection.operators.values()
    assert torch.equal(operator.prompt, model.model.embed_tokens.weight[[7, 3, 7]])
    assert operator.A.shape == (256, 45)
    assert operator.scale == 8 / 45**0.5
    assert sum(p.numel() for p in injection.parameters()) == 3 * 16 + 45 * (256 + 16)


def test_learning_rates() -> None:
    injection = peftcore.apply(host("llama"), "dept", **SMALL)
    groups = injection.optimizer(torch.optim.AdamW, lr=0.3).param_groups
    sizes = {round(group["lr"], 6): sum(p.numel() for p in group["params"]) for group in groups}
    assert sizes == {0.3: 3 * 16, 5e-4: 4 * (6 + 16)}


def test_what_it_refuses() -> None:
    model = host("llama")
    with pytest.raises(ConfigError, match="40"):
        peftcore.apply(model, "dept", init_ids=[40])
    assert not peftcore.injections(model)
    peftcore.apply(model, "dept", **SMALL)
    with peftcore.call(model, prompt_length=4), pytest.raises(SequenceError, match="prefill in one forward"):
        model(input_ids=torch.tensor([[5, 6, 7]]))
