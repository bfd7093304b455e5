"""OLoRA beside peft's and beside its equation: what it starts from, and what it computes once it has trained."""

from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from equation_in_float64 import KINDS, One, adapted, assert_equation, experts
from peft_pairs import ADAPTER, Both, Pair, difference
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from two_layers import Two

from peftcore.testing import against, conformance

RANK, ALPHA = 3, 5.0
OPTIONS: dict[str, Any] = {"rank": RANK, "alpha": ALPHA}


# Twice the default rank is the width of these hosts: factors would have the shape of weights.
@conformance("olora", options={"*": {"rank": 3}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def gram_schmidt(matrix: Tensor) -> Tensor:
    """Orthonormal columns that span the first columns of a matrix, one after the other."""
    columns: list[Tensor] = []
    for column in matrix.T[: min(matrix.shape)]:
        for _ in range(2):  # once more, for what rounding left
            for other in columns:
                column = column - (other @ column) * other
        columns.append(column / column.norm())
    return torch.stack(columns, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_starts_at_an_orthonormal_basis_of_the_first_columns(kind: str) -> None:
    operator = adapted(kind, "olora", **OPTIONS)[2]
    assert torch.equal(operator.A, operator.A0)
    assert torch.equal(operator.B, operator.B0)
    for W, tensors in experts(kind, operator):
        basis = gram_schmidt(W.flatten(1))[:, :RANK]
        assert difference(tensors["B"], basis) <= 1e-10
        assert difference(tensors["A"].flatten(1), basis.T @ W.flatten(1)) <= 1e-10


def test_rank_is_at_most_that_of_the_weight() -> None:
    """Then all of the weight trains, as often as the scale says: it is not taken out of the factors."""
    host, _, operator = adapted("linear", "olora", rank=64, alpha=ALPHA)
    assert (operator.A.shape, operator.B.shape) == ((7, 12), (7, 7))
    assert difference(operator.B0 @ operator.A0, host.layer.weight) <= 1e-10


def changed(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """The paper's: out of the base, and trained back in."""
    frozen = weight - ALPHA / RANK * (tensors["B0"] @ tensors["A0"].flatten(1)).view(weight.shape)
    return frozen + ALPHA / RANK * (tensors["B"] @ tensors["A"].flatten(1)).view(weight.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_equation(kind: str) -> None:
    assert_equation(kind, "olora", changed, **OPTIONS)


def two() -> Two:
    """A layer with more inputs than outputs, and one with fewer."""
    return Two(nn.Linear(12, 7), nn.Linear(7, 9))


def pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    layer: Any = theirs.get_submodule(site.module_path)
    yield Pair(f"{site.path}.A", operator.A, layer.lora_A[ADAPTER].weight, lambda t: t)
    yield Pair(f"{site.path}.B", operator.B, layer.lora_B[ADAPTER].weight, lambda t: t)


def config(*target: str) -> peft.LoraConfig:
    return peft.LoraConfig(r=RANK, lora_alpha=5, init_lora_weights="olora", target_modules=list(target))


@against("peft 0.21", "olora")
def test_beside_peft() -> None:
    """peft keeps the rest of the weight in the base, ours keeps the base: same outputs, gradients, merged weights."""
    torch.manual_seed(0)
    options = {"target": ["first", "second"], **OPTIONS}
    both = Both(two(), "olora", options, config("first", "second"), pairs)
    x = torch.randn(4, 12)
    both.assert_same(lambda model: model(x))


@pytest.mark.filterwarnings("ignore:::peft")
def test_peft_changes_what_is_stored_transposed() -> None:
    """It takes one product out of the base, and adds its transpose; where the layer is not square, nothing fits."""
    base, x = One(Conv1D(7, 7)), torch.randn(4, 7)
    before = base(x)
    assert difference(peft.LoraModel(base, config("layer"), ADAPTER)(x), before) > 0.1  # ours: test_equation
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        peft.LoraModel(One(Conv1D(9, 7)), config("layer"), ADAPTER)(x)
