"""PiSSA beside peft's and beside its equation: what it starts from, and what it computes once it has trained."""

from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from equation_in_float64 import KINDS, adapted, assert_equation, experts
from peft_pairs import ADAPTER, Both, Pair, difference
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from two_layers import Two

from peftcore.testing import against, conformance

RANK, ALPHA = 3, 5.0
OPTIONS: dict[str, Any] = {"rank": RANK, "alpha": ALPHA}


# Twice the default rank is the width of these hosts: factors would have the shape of weights.
@conformance("pissa", options={"*": {"rank": 3}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("kind", KINDS)
def test_starts_at_the_largest_singular_values(kind: str) -> None:
    """By the eigenvectors of W W', another algorithm: B0 A0 is the projection of W, and both factors have half of it.

    The scale is taken out of the factors, so that all of the principal part trains whatever alpha is.
    """
    operator = adapted(kind, "pissa", **OPTIONS)[2]
    assert torch.equal(operator.A, operator.A0)
    assert torch.equal(operator.B, operator.B0)
    scale = ALPHA / RANK
    for W, tensors in experts(kind, operator):
        A, B = tensors["A"].flatten(1), tensors["B"]
        values, vectors = torch.linalg.eigh(W.flatten(1) @ W.flatten(1).T)
        largest = vectors[:, -RANK:]
        assert difference(scale * B @ A, largest @ largest.T @ W.flatten(1)) <= 1e-10
        halves = torch.diag(values[-RANK:].flip(0).sqrt() / scale)
        assert difference(A @ A.T, halves) <= 1e-10
        assert difference(B.T @ B, halves) <= 1e-10
        assert (B.gather(0, B.abs().argmax(0, keepdim=True)) > 0).all(), "the sign is up to the machine"


def test_rank_is_at_most_that_of_the_weight() -> None:
    """Then all of the weight trains."""
    host, _, operator = adapted("linear", "pissa", rank=64, alpha=ALPHA)
    assert (operator.A.shape, operator.B.shape) == ((7, 12), (7, 7))
    assert difference(ALPHA / 64 * operator.B0 @ operator.A0, host.layer.weight) <= 1e-10


def changed(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """The paper's: out of the base, and trained back in."""
    products = [tensors[f"B{end}"] @ tensors[f"A{end}"].flatten(1) for end in ("", "0")]
    return weight - ALPHA / RANK * products[1].view(weight.shape) + ALPHA / RANK * products[0].view(weight.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_equation(kind: str) -> None:
    assert_equation(kind, "pissa", changed, **OPTIONS)


def two() -> Two:
    """Layers stored one way and the other."""
    return Two(nn.Linear(12, 7), Conv1D(9, 7))


def pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    layer: Any = theirs.get_submodule(site.module_path)
    yield Pair(f"{site.path}.A", operator.A, layer.lora_A[ADAPTER].weight, lambda t: t)
    yield Pair(f"{site.path}.B", operator.B, layer.lora_B[ADAPTER].weight, lambda t: t)


@pytest.mark.filterwarnings("ignore:::peft")
@against("peft 0.21", "pissa")
def test_beside_peft() -> None:
    """peft keeps the rest of the weight in the base, ours keeps the base: same outputs, gradients, merged weights."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=RANK, lora_alpha=5, init_lora_weights="pissa", target_modules=["first", "second"])
    both = Both(two(), "pissa", {"target": ["first", "second"], **OPTIONS}, config, pairs)
    x = torch.randn(4, 12)
    both.assert_same(lambda model: model(x))
    with pytest.raises(TypeError, match="float32"):
        peft.LoraModel(two().double(), config, ADAPTER)  # ours: every other test of this file


def test_iterations_approach_the_exact_start() -> None:
    """The fast way: with few of them near, with many there."""
    exact = adapted("linear", "pissa", **OPTIONS)[2]
    product, errors = exact.B0 @ exact.A0, []
    for iterations in (1, 8, 200):
        fast = adapted("linear", "pissa", **OPTIONS, iterations=iterations)[2]
        errors.append(difference(fast.B0 @ fast.A0, product))
    assert errors[0] > errors[1] > 1e-3
    assert errors[2] <= 1e-10
