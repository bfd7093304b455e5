"""DoRA: magnitude and direction, the norm as a constant of backward, rows without a direction. Its numbers beside
peft's, and its equation on the layers that peft lacks, are in the repository's side-by-side tests."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from one_layer import One
from torch import Tensor, nn

import peftcore
from peftcore.testing import conformance
from peftcore.testing.hosts import HOSTS


@conformance("dora", options={"*": {"alpha": 12.0}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def adapted(layer: nn.Module, **options: Any) -> tuple[nn.Module, peftcore.Injection, Any]:
    """A double host, its injection with random factors, and the operator."""
    model = One(layer).double()
    injection = peftcore.apply(model, "dora", target="layer", dtype="float64", **{"rank": 2, "alpha": 4.0} | options)
    (operator,) = injection.operators.values()
    nn.init.normal_(operator.A)
    nn.init.normal_(operator.B)
    return model, injection, operator


LAYERS = [
    pytest.param(lambda: nn.Linear(6, 4), id="linear"),
    pytest.param(lambda: nn.Conv2d(4, 6, 3, groups=2), id="grouped"),
    pytest.param(lambda: nn.ConvTranspose1d(4, 6, 3), id="transposed"),
    pytest.param(lambda: nn.Embedding(9, 5), id="embedding"),
]


@pytest.mark.parametrize("build", LAYERS)
def test_magnitude_starts_as_the_norm_of_each_output_row(build: Any) -> None:
    layer = build()
    operator = peftcore.apply(One(layer), "dora", target="layer").operators
    (operator,) = operator.values()
    weight = operator.layer.logical(layer.weight)
    expected = [row.square().sum().sqrt().item() for row in weight]
    assert operator.magnitude.tolist() == pytest.approx(expected, rel=1e-6)
    assert operator.A.any() != operator.B.any()  # one factor is zero, as in LoRA


@pytest.mark.parametrize("build", LAYERS)
def test_rows_have_the_learned_magnitude_whatever_the_direction(build: Any) -> None:
    layer = build()
    _, injection, operator = adapted(layer)
    nn.init.uniform_(operator.magnitude, 0.5, 2.0)
    before = operator.layer.logical(layer.weight).detach().clone()
    injection.merge()
    rows = operator.layer.logical(layer.weight)
    torch.testing.assert_close(rows.flatten(1).norm(dim=1), operator.magnitude)
    cosine = nn.functional.cosine_similarity(rows.flatten(1), before.flatten(1))
    assert (cosine < 0.999).all(), "the directions did not turn"


def test_scaling_the_base_and_the_factors_together_changes_nothing() -> None:
    """The direction alone counts: a property of the quotient that LoRA has not."""
    x = torch.randn(3, 6).double()
    model, _, operator = adapted(nn.Linear(6, 4, bias=False))
    before = model(x)
    with torch.no_grad():
        model.layer.weight.mul_(3)
        operator.B.mul_(3)
    torch.testing.assert_close(model(x), before)


def gradients(model: nn.Module, operator: Any, x: Tensor, direction: Tensor) -> dict[str, Tensor]:
    operator.zero_grad()
    (model(x) * direction).sum().backward()
    return {name: p.grad.clone() for name, p in operator.named_parameters()}


def by_equation(layer: nn.Linear, operator: Any, x: Tensor, direction: Tensor, constant: bool) -> dict[str, Tensor]:
    """The gradients with the norm as a constant, or with the norm a function of A and B as everything else."""
    A, B, m = (p.detach().clone().requires_grad_() for p in (operator.A, operator.B, operator.magnitude))
    V = layer.weight.detach() + 2.0 * B @ A
    norm = V.norm(dim=1, keepdim=True)
    weight = m[:, None] * V / (norm.detach() if constant else norm)
    (nn.functional.linear(x, weight) * direction).sum().backward()
    return {"A": A.grad, "B": B.grad, "magnitude": m.grad}


def test_norm_is_a_constant_in_backward() -> None:
    """Section 4.3 of the paper. The other version's gradients differ in A and B, not in the magnitude."""
    x, direction = torch.randn(3, 6).double(), torch.randn(3, 4).double()
    model, _, operator = adapted(nn.Linear(6, 4, bias=False))
    found = gradients(model, operator, x, direction)
    constant = by_equation(model.layer, operator, x, direction, constant=True)
    moving = by_equation(model.layer, operator, x, direction, constant=False)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, constant[name])
    for name in ("A", "B"):
        assert (found[name] - moving[name]).abs().max() > 0.1 * moving[name].abs().max()
    torch.testing.assert_close(found["magnitude"], moving["magnitude"])


def test_rows_of_zeros_stay_zero_and_train_without_nan() -> None:
    layer = nn.Linear(6, 4, bias=False)
    nn.init.zeros_(layer.weight[1].data)
    model = One(layer)
    injection = peftcore.apply(model, "dora", target="layer", rank=2)
    operator = injection.operators["layer"]
    x = torch.randn(3, 6)
    assert operator.magnitude[1] == 0
    assert not model(x)[:, 1].any()
    model(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in injection.parameters())
    injection.merge()
    assert not layer.weight[1].any()
    assert torch.isfinite(layer.weight).all()


def test_norms_follow_the_factors_after_the_start() -> None:
    """The norm is a constant of backward, not of training: it is computed again in each forward."""
    x = torch.randn(3, 6).double()
    model, _, operator = adapted(nn.Linear(6, 4, bias=False))
    nn.init.ones_(operator.magnitude)
    with torch.no_grad():
        for factor in (1.0, 50.0):
            operator.B.mul_(factor)
            V = model.layer.weight + 2.0 * operator.B @ operator.A
            torch.testing.assert_close(model(x), nn.functional.linear(x, V / V.norm(dim=1, keepdim=True)))


def test_experts_have_magnitudes_of_their_own() -> None:
    model, _ = HOSTS["moe"].build()
    path = "model.layers.0.mlp.experts.down_proj"
    operator = peftcore.apply(model, "dora", target="*.experts.down_proj").operators[path]
    torch.testing.assert_close(operator.magnitude, model.get_parameter(path).norm(dim=2))


@pytest.mark.parametrize(
    ("layer", "count"),
    [
        (nn.Linear(6, 4), 3 * (6 + 4) + 4),
        (nn.Conv2d(4, 6, (3, 2), groups=2), 3 * (2 * 6 + 6) + 6),
        (nn.Embedding(9, 5), 3 * (9 + 5) + 5),
    ],
    ids=["linear", "grouped", "embedding"],
)
def test_number_of_parameters(layer: nn.Module, count: int) -> None:
    assert peftcore.plan(One(layer), "dora", target="layer", rank=3).trainable == count
    injection = peftcore.apply(One(layer), "dora", target="layer", rank=3)
    assert sum(p.numel() for p in injection.parameters()) == count
