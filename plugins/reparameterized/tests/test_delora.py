"""DeLoRA beside peft's and beside its equation, one pair of a row and a column after the other; and its bound."""

from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from equation_in_float64 import KINDS, adapted, assert_equation, fill, hosted, logical
from peft_pairs import ADAPTER, Both, Pair, difference
from torch import Tensor, nn
from two_layers import Two

import peftcore
from peftcore.layers import kernels
from peftcore.testing import HOSTS, against, conformance

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
RANK = 3


# Weights of these hosts are narrow, and their columns short beside those of the paper's.
@conformance("delora", options={"*": {"rank": 4, "strength": 3.0}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def equation(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    matrix, A, B = weight.flatten(1), tensors["A"].flatten(1), tensors["B"]
    update = 0
    for i in range(RANK):
        a, b = A[i], B[:, i]
        update = update + torch.outer(b / (b @ b).sqrt(), a / (a @ a).sqrt())
    columns = torch.stack([(column @ column).sqrt() for column in matrix.T])
    return weight + (tensors["strength"] / RANK * update * columns).view(weight.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_equation(kind: str) -> None:
    assert_equation(kind, "delora", equation, rank=RANK)


@pytest.mark.parametrize("kind", ["linear", "convolution", "embedding", "experts"])
def test_the_update_is_bounded(kind: str) -> None:
    """By lambda times the longest column, however large the factors are; and it is there after the smallest step."""
    host, _, operator = adapted(kind, "delora", rank=RANK, strength=2.0)
    weight = logical(kind, host)
    assert torch.equal(operator.merged(weight), weight)
    matrices = weight if kind == "experts" else weight.flatten(1)[None]
    bound = 2.0 * matrices.square().sum(-2).sqrt().amax(-1)
    for size in (1e-3, 1e3):
        fill(operator)
        with torch.no_grad():
            operator.strength.fill_(2.0)
            operator.A.mul_(size)
            operator.B.mul_(size)
        update = (operator.merged(weight) - weight).view(matrices.shape)
        norm = update.square().sum((-2, -1)).sqrt()
        assert (norm <= bound).all()
        assert (norm > 0.2 * bound).all()


def test_short_factors_count_as_longer() -> None:
    _, _, operator = adapted("linear", "delora", rank=1, strength=1.0)
    nn.init.constant_(operator.A, 2.0)
    nn.init.zeros_(operator.B).data[0, 0] = 5e-5
    A, B, scale = operator.factors()
    assert scale == 1
    assert (B[0, 0] * A[0] / operator.n[0] - 0.5 / 12**0.5).abs().max() <= 1e-12


def test_lengths_of_columns_are_those_of_the_base() -> None:
    """They are in the file: another base model, merged or packed, does not change them."""
    _, injection, operator = adapted("linear", "delora", rank=RANK)
    expected = hosted("linear")[0].layer.weight.norm(dim=0)
    assert difference(operator.n[0], expected) <= 1e-12
    assert {name.rpartition(".")[2] for name in injection.state_dict()} == {"A", "B", "strength", "n"}


def two() -> Two:
    """More inputs than outputs, and fewer."""
    return Two(nn.Linear(12, 7), nn.Linear(7, 9))


def pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    layer: Any = theirs.get_submodule(site.module_path)
    assert difference(operator.n[0], layer.delora_w_norm[ADAPTER]) <= 1e-6
    yield Pair(f"{site.path}.A", operator.A, layer.delora_A[ADAPTER], lambda t: t)
    yield Pair(f"{site.path}.B", operator.B, layer.delora_B[ADAPTER], lambda t: t)
    yield Pair(f"{site.path}.strength", operator.strength, layer.delora_lambda[ADAPTER], lambda t: t)


def both(base: nn.Module, target: list[str], **options: Any) -> Both:
    config = peft.DeloraConfig(target_modules=target, r=RANK, **options)
    dtype = str(next(base.parameters()).dtype).removeprefix("torch.")
    ours = {"target": target, "rank": RANK, "dropout": options.get("module_dropout", 0.0), "dtype": dtype}
    return Both(base, "delora", ours, config, pairs)


@pytest.mark.parametrize("training", [False, True])
@against("peft 0.21", "delora")
def test_beside_peft(training: bool) -> None:
    """Outputs, gradients, merged weights, and as many parameters."""
    torch.manual_seed(0)
    compared = both(two().double().train(training), ["first", "second"])
    count = sum(p.numel() for p in compared.tuner.model.parameters() if p.requires_grad)
    assert count == sum(p.numel() for p in compared.injection.parameters()) == RANK * (12 + 7 + 7 + 9) + 2
    x = torch.randn(2, 3, 12).double()
    compared.assert_same(lambda model: model(x))


@against("peft 0.21", "delora")
def test_dropout_beside_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the masks that torch's own dropout draws."""

    def mask(x: Tensor, p: float) -> tuple[Tensor, float]:
        return F.dropout(torch.ones_like(x), p) > 0, 1 / (1 - p)

    for module in (kernels.fused_dropout, kernels.low_rank):
        monkeypatch.setattr(module, "dropout_mask", mask)
    torch.manual_seed(0)
    compared = both(two().double().train(), ["first"], module_dropout=0.4)
    compared.change("first.strength", lambda strength: strength.fill_(9))
    x = torch.randn(2, 3, 12).double()
    compared.assert_same_outputs(lambda model: model(x))


@against("peft 0.21", "delora")
def test_a_model_beside_peft() -> None:
    model, inputs = HOSTS["llama"].build()
    both(model.eval(), ["q_proj", "v_proj"]).assert_same(lambda adapted: adapted(**inputs).logits)


def test_a_fresh_adapter_starts_as_the_base_and_has_gradients() -> None:
    model = nn.Sequential(nn.Linear(12, 7))
    x = torch.randn(5, 12)
    expected = model(x)
    injection = peftcore.apply(model, "delora", target="0")
    assert torch.equal(model(x), expected)
    model(x).sum().backward()
    operator = injection.operators["0"]
    assert operator.B.grad.abs().min() > 0
    assert not operator.A.grad.any()
