"""LoRA: what the paper says of its start, its scale and its dropout. Its numbers beside peft's, and its equation on the
layers that peft lacks, are in the repository's side-by-side tests."""

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from one_layer import One
from torch import nn

import peftcore
from peftcore.errors import NotMergeable, UnsupportedSite
from peftcore.testing import conformance
from peftcore.testing.hosts import HOSTS


@conformance("lora", options={"*": {"alpha": 12.0}})  # a scale of 1 would hide what forgets it
def test_conformance(check: Callable[[], None]) -> None:
    check()


def operator_on(layer: nn.Module, **options: Any) -> Any:
    return peftcore.apply(One(layer), "lora", target="layer", **options).operators["layer"]


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [(nn.Linear(400, 30), 400), (nn.Conv2d(25, 30, 4), 400), (nn.Conv2d(50, 30, 4, groups=2), 400)],
    ids=["linear", "convolution", "grouped"],
)
def test_A_starts_uniform_and_B_at_zero(layer: nn.Module, inputs: int) -> None:
    """Uniform within 1 / sqrt(inputs of one output), as torch starts a linear layer."""
    operator = operator_on(layer, rank=50)
    bound = 1 / math.sqrt(inputs)
    values = operator.A.detach().flatten()
    assert values.numel() == 50 * inputs
    assert values.abs().max() <= bound
    assert values.abs().max() > 0.99 * bound
    assert abs(values.mean()) < 0.02 * bound
    assert abs(values.std() * math.sqrt(3) / bound - 1) < 0.02  # the deviation of a uniform distribution
    assert not operator.B.any()


def test_embeddings_start_the_other_way_round() -> None:
    """Every input picks one column of A, so a random A and a zero B would train no faster than chance has it."""
    operator = operator_on(nn.Embedding(300, 200), rank=16)
    assert not operator.A.any()
    assert abs(operator.B.mean()) < 0.05
    assert abs(operator.B.std() - 1) < 0.05


def test_exactly_one_factor_is_zero_so_the_other_gets_a_gradient() -> None:
    model = One(nn.Linear(6, 4))
    operator = peftcore.apply(model, "lora", target="layer").operators["layer"]
    model(torch.randn(3, 6)).sum().backward()
    assert operator.B.grad.abs().max() > 0
    assert not operator.A.grad.any()


def test_experts_start_apart() -> None:
    model, _ = HOSTS["moe"].build()
    A = peftcore.apply(model, "lora", target="*.experts.down_proj").operators["model.layers.0.mlp.experts.down_proj"].A
    assert A.shape == (3, 8, 24)
    assert all(not torch.equal(A[i], A[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize(("rank", "alpha"), [(8, 8.0), (4, 8.0), (3, 1.5)])
def test_scale_is_alpha_over_rank(rank: int, alpha: float) -> None:
    layer = nn.Linear(6, 4)
    operator = operator_on(layer, rank=rank, alpha=alpha)
    nn.init.normal_(operator.B)
    x, before = torch.randn(5, 6), layer.weight.detach().clone()
    expected = nn.functional.linear(x, before, layer.bias) + alpha / rank * (x @ operator.A.T) @ operator.B.T
    torch.testing.assert_close(layer(x), expected)
    A, B, scale = operator.factors()
    torch.testing.assert_close(operator.merged(before), before + scale * B @ A)


@pytest.mark.parametrize("layer", [nn.Conv2d(6, 4, 3, groups=2, padding=1), nn.Conv1d(6, 9, 2, stride=2, groups=3)])
def test_across_groups_A_reads_all_channels(layer: Any) -> None:
    """As two convolutions, the second one in groups; the weight of the layer could not hold it."""
    model = One(layer.double())
    options = {"target": "layer", "rank": 6, "alpha": 9.0, "across_groups": True, "dtype": "float64"}
    plan = peftcore.plan(model, "lora", **options).trainable
    injection = peftcore.apply(model, "lora", **options)
    (operator,) = injection.operators.values()
    assert operator.A.shape[:2] == (6, 6) and operator.B.shape == (layer.out_channels, 6 // layer.groups)
    assert plan == operator.A.numel() + operator.B.numel()
    nn.init.normal_(operator.B)
    x = torch.randn(2, 6, *[8] * len(layer.kernel_size), dtype=torch.float64)
    conv = {1: nn.functional.conv1d, 2: nn.functional.conv2d}[len(layer.kernel_size)]
    factors = [each.detach().clone().requires_grad_() for each in (operator.A, operator.B)]
    low = conv(x, factors[0], stride=layer.stride, padding=layer.padding)
    up = factors[1].view(*factors[1].shape, *[1] * len(layer.kernel_size))
    expected = conv(x, layer.weight, layer.bias, layer.stride, layer.padding, groups=layer.groups)
    expected = expected + 9 / 6 * conv(low, up, groups=layer.groups)
    output = model(x)
    torch.testing.assert_close(output, expected)
    direction = torch.randn_like(output)
    (output * direction).sum().backward()
    (expected * direction).sum().backward()
    for ours, theirs in zip((operator.A, operator.B), factors, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    with pytest.raises(NotMergeable):
        injection.merge()


def test_across_groups_elsewhere_is_lora() -> None:
    for layer in (nn.Linear(6, 4), nn.Conv2d(4, 4, 3), nn.ConvTranspose1d(4, 4, 3, groups=2)):
        plain, other = (operator_on(deepcopy(layer), across_groups=value) for value in (False, True))
        assert type(plain) is type(other) and plain.A.shape == other.A.shape
    with pytest.raises(UnsupportedSite, match="3 groups, which rank=8 is not a multiple of"):
        operator_on(nn.Conv1d(6, 9, 2, groups=3), across_groups=True)


# Dropout


def dropped(rate: float) -> tuple[nn.Module, peftcore.Injection]:
    model = One(nn.Linear(6, 4))
    injection = peftcore.apply(model, "lora", target="layer", rank=2, dropout=rate)
    nn.init.normal_(injection.operators["layer"].B)
    return model, injection


def test_dropout_acts_in_training_only() -> None:
    model, injection = dropped(0.5)
    x = torch.randn(5, 6)
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    evaluated = model(x)
    assert torch.equal(evaluated, model(x))
    injection.merge()
    torch.testing.assert_close(model(x), evaluated)


def test_dropout_hits_the_input_of_the_update_alone() -> None:
    """With nearly everything dropped, the base remains; what is kept is scaled up, so the mean stays."""
    model, injection = dropped(0.999)
    x = torch.randn(5, 6)
    with injection.disabled():
        base = model(x)
    assert torch.equal(model.train()(x), base)
    model, injection = dropped(0.5)
    expected = model.eval()(x)
    mean = torch.stack([model.train()(x).detach() for _ in range(4000)]).mean(0)
    assert (mean - expected).abs().max() < 0.1 * (
        expected - nn.functional.linear(x, model.layer.weight, model.layer.bias)
    ).abs().max()


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(4, 4, 3, groups=2), nn.Conv1d(4, 4, 3, padding=1, padding_mode="reflect"), nn.ConvTranspose1d(4, 4, 3)],
    ids=["grouped", "reflecting", "transposed"],
)
def test_dropout_is_refused_where_it_cannot_reach_the_input(layer: nn.Module) -> None:
    model = One(layer)
    with pytest.raises(UnsupportedSite, match=r"dropout cannot reach its input; use dropout=0"):
        peftcore.apply(model, "lora", target="layer", dropout=0.1)
    assert type(model.layer) is type(layer)
    assert not peftcore.injections(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert peftcore.apply(model, "lora", target="layer").operators.keys() == {"layer"}


def test_dropout_is_refused_on_attention_that_reads_its_projections() -> None:
    with pytest.raises(UnsupportedSite, match="in_proj_weight"):
        peftcore.apply(One(nn.MultiheadAttention(8, 2)), "lora", target=nn.MultiheadAttention, dropout=0.1)


@pytest.mark.parametrize(
    ("layer", "rank", "count"),
    [
        (nn.Linear(6, 4), 3, 3 * (6 + 4)),
        (nn.Conv2d(4, 6, (3, 2)), 3, 3 * (4 * 6 + 6)),
        (nn.Conv2d(4, 6, (3, 2), groups=2), 3, 3 * (2 * 6 + 6)),
        (nn.ConvTranspose2d(4, 6, (3, 2), groups=2), 3, 3 * (2 * 6 + 6)),
        (nn.Embedding(9, 5), 2, 2 * (9 + 5)),
    ],
    ids=["linear", "convolution", "grouped", "transposed", "embedding"],
)
def test_number_of_parameters(layer: nn.Module, rank: int, count: int) -> None:
    assert peftcore.plan(One(layer), "lora", target="layer", rank=rank).trainable == count
    injection = peftcore.apply(One(layer), "lora", target="layer", rank=rank)
    assert sum(p.numel() for p in injection.parameters()) == count
