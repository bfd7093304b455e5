"""VB-LoRA beside peft's and beside its equation, sub-vector by sub-vector; the bank that sites share, and its rates."""

from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from equation_in_float64 import KINDS, adapted, assert_equation, fill, logical
from peft_pairs import ADAPTER, Both, Pair, difference
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from two_layers import Two

import peftcore
from peftcore.errors import ConfigError
from peftcore.testing import against, conformance

OPTIONS: dict[str, Any] = {"rank": 2, "num_vectors": 6, "vector_length": 4, "topk": 2}


# The default bank is larger than these hosts.
@conformance("vb_lora", options={"*": {"num_vectors": 10, "vector_length": 8}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def sub_vector(logits: Tensor, vectors: Tensor, k: int) -> Tensor:
    """The mixture of the vectors that belong to the k largest logits."""
    best = sorted(range(len(logits)), key=lambda i: -logits[i].item())[:k]
    total = sum(logits[i].exp() for i in best)
    return sum(logits[i].exp() / total * vectors[i] for i in best)


@pytest.mark.parametrize("kind", KINDS)
def test_equation(kind: str) -> None:
    """Of sides that 4 divides, and others, whose last sub-vector is cut."""
    vectors = adapted(kind, "vb_lora", **OPTIONS)[2].bank.module.vectors.detach().double()

    def mixed(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        out, columns = weight.flatten(1).shape
        A = [torch.cat([sub_vector(each, vectors, 2) for each in row])[:columns] for row in tensors["logits_A"]]
        B = [torch.cat([sub_vector(each[r], vectors, 2) for each in tensors["logits_B"]])[:out] for r in range(2)]
        return weight + sum(torch.outer(b, a) for a, b in zip(A, B, strict=True)).view(weight.shape)

    assert_equation(kind, "vb_lora", mixed, **OPTIONS, bank_bound=0.02)


def test_start() -> None:
    """The bank within its bound, logits of their deviation; the output moves, by little."""
    _, injection, operator = adapted("linear", "vb_lora", rank=4, num_vectors=500)
    vectors = injection.shared["bank"].vectors
    assert vectors.shape == (500, 256)
    assert 0.0199 < vectors.abs().max() <= 0.02 and vectors.mean().abs() < 1e-4
    for logits in (operator.logits_A, operator.logits_B):
        assert abs(logits.std() - 0.1) < 0.01
    weight = logical("linear", adapted("linear", "vb_lora")[0])
    assert 0 < difference(operator(lambda x: x @ weight.T, torch.eye(12).double()), weight.T) < 1e-2


def two() -> Two:
    """Several widths that 4 divides; stored one way and the other."""
    return Two(nn.Linear(12, 8), Conv1D(16, 8))


TARGET = ["first", "second"]


def pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    layer: Any = theirs.get_submodule(site.module_path)
    bank = operator.bank.module
    yield Pair(f"{site.path}.A", operator.logits_A, layer.vblora_logits_A[ADAPTER], lambda t: t)
    yield Pair(f"{site.path}.B", operator.logits_B, layer.vblora_logits_B[ADAPTER], lambda t: t)
    yield Pair(f"{site.path}.bank", bank.vectors, layer.vblora_vector_bank[ADAPTER], lambda t: t)


@pytest.mark.filterwarnings("ignore:::peft")
@against("peft 0.21", "vb_lora")
def test_beside_peft() -> None:
    """Outputs, gradients of the logits and of the bank, merged weights, and how many train."""
    torch.manual_seed(0)
    config = peft.VBLoRAConfig(r=2, num_vectors=6, vector_length=4, topk=3, target_modules=TARGET)
    both = Both(two().double(), "vb_lora", {**OPTIONS, "topk": 3, "target": TARGET, "dtype": "float64"}, config, pairs)
    for pair in both.pairs:  # the bank comes twice, and is filled once
        pair.seen(pair.theirs.data).copy_(pair.ours)
    theirs = {id(p): p.numel() for p in both.tuner.parameters() if p.requires_grad}
    ours = sum(p.numel() for p in both.injection.parameters())
    assert ours == sum(theirs.values()) == 6 * 4 + 2 * 6 * (12 + 8 + 8 + 16) // 4
    x = torch.randn(4, 12).double()
    for model in (both.ours, both.tuner):
        model.train()
    both.assert_same(lambda model: model(x))


def test_logits_have_a_rate_of_their_own() -> None:
    _, injection, operator = adapted("linear", "vb_lora", **OPTIONS)
    bank, logits = injection.optimizer(torch.optim.AdamW, lr=1e-3).param_groups
    assert (bank["lr"], logits["lr"]) == (1e-3, 1e-2)
    assert {id(p) for p in bank["params"]} == {id(injection.shared["bank"].vectors)}
    assert {id(p) for p in logits["params"]} == {id(p) for p in operator.parameters()}


def test_only_what_is_chosen_gets_gradients() -> None:
    host, injection, operator = adapted("linear", "vb_lora", **{**OPTIONS, "topk": 1})
    fill(operator)
    host(torch.randn(3, 12).double()).sum().backward()
    vectors = injection.shared["bank"].vectors
    chosen = {i.item() for logits in operator.parameters() for i in logits.argmax(-1).flatten()}
    assert {i for i, row in enumerate(vectors.grad) if row.any()} == chosen
    assert not operator.logits_A.grad.any()  # the weight of one that is alone is 1


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="topk=7 is more than num_vectors=6"):
        adapted("linear", "vb_lora", **{**OPTIONS, "topk": 7})
    with pytest.raises(ConfigError, match="vector_length cannot change at single sites"):
        peftcore.apply(two(), "vb_lora", target=TARGET, **OPTIONS, overrides={"first": {"vector_length": 2}})
