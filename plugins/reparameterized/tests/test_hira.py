"""HiRA beside peft's and beside its equation; the rank of what it changes, and the zeros that it leaves."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import peft
import pytest
import torch
from equation_in_float64 import KINDS, One, adapted, assert_equation, fill, hosted
from peft_pairs import ADAPTER, Both, Pair
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peftcore
from peftcore.testing import against, conformance

RANK = 3


# Factors of the default rank would be larger than these hosts' weights.
@conformance("hira", options={"*": {"rank": 4}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def entries(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    change = torch.einsum("or,ri...->oi...", tensors["B"], tensors["A"])
    return weight * (1 + change)


@pytest.mark.parametrize("kind", KINDS)
def test_equation(kind: str) -> None:
    assert_equation(kind, "hira", entries, rank=RANK)


LAYERS = {
    "linear": lambda: (nn.Linear(12, 7), torch.randn(2, 3, 12)),
    "transposed": lambda: (Conv1D(7, 12), torch.randn(2, 3, 12)),
    "conv1d": lambda: (nn.Conv1d(4, 6, 3, stride=2, padding=1), torch.randn(2, 4, 9)),
    "conv2d": lambda: (nn.Conv2d(4, 6, (3, 2), stride=2, padding=1), torch.randn(2, 4, 7, 6)),
    "embedding": lambda: (nn.Embedding(20, 7), torch.randint(20, (4, 9))),
}


def pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    layer: Any = theirs.get_submodule(site.module_path)
    table = ADAPTER in layer.hira_embedding_A
    A, B = (layer.hira_embedding_A, layer.hira_embedding_B) if table else (layer.hira_A, layer.hira_B)
    yield Pair(f"{site.path}.A", operator.A, A[ADAPTER], lambda t: t.view(operator.A.shape))
    yield Pair(f"{site.path}.B", operator.B, B[ADAPTER], lambda t: t.view(operator.B.shape))


@pytest.mark.filterwarnings("ignore:::peft")
@pytest.mark.parametrize("kind", LAYERS)
@against("peft 0.21", "hira")
def test_beside_peft(kind: str) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[kind]()
    base = One(layer)
    for tensor in base.parameters():
        nn.init.normal_(tensor)  # weights of a few hundredths would hardly move with their product
    config = peft.HiraConfig(r=RANK, target_modules=["layer"])
    Both(base, "hira", {"target": "layer", "rank": RANK}, config, pairs).assert_same(lambda model: model(x))


def test_rank_of_the_change_is_a_product() -> None:
    """LoRA's change has `rank` directions; this one has rank * rank(W)."""
    weight = torch.randn(12, 2).double() @ torch.randn(2, 12).double()
    host = One(nn.Linear(12, 12)).double()
    host.layer.weight.data.copy_(weight)
    injection = peftcore.apply(host, "hira", target="layer", rank=RANK, dtype="float64")
    fill(injection.operators["layer"])
    injection.merge()
    assert torch.linalg.matrix_rank(host.layer.weight - weight) == 2 * RANK


def test_zeros_stay() -> None:
    """Merged too, to the bit: what was pruned stays pruned."""
    host, _ = hosted("linear")
    pruned = host.layer.weight.abs() < 0.1
    host.layer.weight.data[pruned] = 0
    before = deepcopy(host.layer.weight)
    injection = peftcore.apply(host, "hira", target="layer", rank=RANK, dtype="float64")
    fill(injection.operators["layer"])
    injection.bake()
    assert pruned.any()
    assert torch.equal(host.layer.weight == 0, pruned)
    assert not torch.equal(host.layer.weight, before)


def test_small_changes_survive_half_precision() -> None:
    """1 + BA, rounded to bfloat16, would be 1: what is added to the weight is the product instead."""
    operator = adapted("linear", "hira", rank=RANK)[2].bfloat16()
    nn.init.constant_(operator.A, 1e-3)
    nn.init.ones_(operator.B)
    weight = torch.full((7, 12), 3.0, dtype=torch.float64)
    assert torch.allclose(operator(weight) - weight, torch.tensor(9e-3).double(), rtol=0.02)
