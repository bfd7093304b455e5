"""The update of a linear layer is computed with the layer, where nothing else acts."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from core_toys import stir
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftcore
from peftcore.layers.detect import dense_layer
from peftcore.layers.kernels import low_rank_linear
from peftcore.layers.kinds import SMALL


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Outputs of the layers whose update was computed with them."""
    seen: list[int] = []

    def recorded(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
        seen.append(len(weight))
        return low_rank_linear(x, weight, *args)

    monkeypatch.setattr("peftcore.layers.kernels.low_rank_linear", recorded)
    return seen


def conv1d(inputs: int, outputs: int) -> nn.Module:
    """GPT-2's layer, whose weight is transposed."""
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(outputs, inputs)


KINDS = pytest.mark.parametrize("kind", [nn.Linear, conv1d])


def linears(kind: Callable[[int, int], nn.Module] = nn.Linear) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(kind(4, 6), kind(6, 5))


X = torch.linspace(-1, 1, 4 * 4000).view(2, 2000, 4)


@KINDS
def test_an_update_is_computed_with_the_layer_where_nothing_else_acts(
    kind: Callable[[int, int], nn.Module], fused: list[int]
) -> None:
    model = linears(kind)
    stir(peftcore.apply(model, "lora", target=["0", "1"], name="one"))
    expected = model(X)
    assert fused == [6, 5]
    with torch.no_grad():
        assert torch.equal(model(X), expected), "a checkpoint's first forward has no gradients, and its second has"
    assert fused == [6, 5] * 2
    stir(peftcore.apply(model, "lora", target=["1"], name="two"))
    model(X)
    assert fused == [6, 5] * 3, "the second of two goes round the first"


ROWS: dict[str, Callable[[int], Tensor]] = {
    "a matrix": lambda width: torch.randn(400, width),
    "batches": lambda width: torch.randn(2, 200, width),
    "strided batches": lambda width: torch.randn(200, 2, width).transpose(0, 1),
    "a token": lambda width: torch.randn(2, 1, width),
}


@pytest.mark.parametrize(
    ("kind", "rows"),
    [(kind, rows) for kind in (nn.Linear, conv1d) for rows in ROWS if kind is nn.Linear or rows != "strided batches"],
)  # transformers' layer takes no strided inputs
@pytest.mark.parametrize("training", [False, True])
def test_a_fresh_update_leaves_a_linear_layer_as_it_is_to_the_bit(
    training: bool, kind: Callable[[int, int], nn.Module], rows: str
) -> None:
    """Of sums so long that another order of adding them, or another library, would round them differently."""
    torch.manual_seed(0)
    model, x = nn.Sequential(kind(704, 512), nn.Linear(512, 704, bias=False)), ROWS[rows](704)
    with torch.no_grad():
        expected = model(x)
    peftcore.apply(model, "lora", target=["0", "1"])
    model.train(training)
    assert torch.equal(model(x.requires_grad_()), expected)
    with torch.no_grad():
        assert torch.equal(model(x), expected)


@KINDS
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_an_update_computed_with_the_layer_has_the_gradients_of_one_beside_it(
    dropout: float,
    kind: Callable[[int, int], nn.Module],
    fused: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = linears(kind).double()
    stir(injection := peftcore.apply(model, "lora", target=["0", "1"], dropout=dropout, dtype="float64"))
    model.train()
    found = []
    for small in (SMALL, 10**9):
        monkeypatch.setattr("peftcore.layers.kinds.SMALL", small)
        torch.manual_seed(0)
        x = X.double().requires_grad_()
        output = model(x)
        found.append([output, *torch.autograd.grad(output.square().mean(), [x, *injection.parameters()])])
    assert fused == [6, 5]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_an_input_of_another_dtype_is_refused_as_the_layer_itself_does(dropout: float, fused: list[int]) -> None:
    model = linears()
    with pytest.raises(RuntimeError, match="dtype"):
        model(X.double())
    stir(peftcore.apply(model, "lora", target=["0", "1"], dropout=dropout))
    model.train()
    with pytest.raises(RuntimeError, match="dtype"):
        model(X.double().requires_grad_())
    assert fused == [6]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_an_update_computed_with_the_layer_is_computed_again_in_backward(use_reentrant: bool, fused: list[int]) -> None:
    model = linears()
    stir(injection := peftcore.apply(model, "lora", target=["0", "1"]))
    found = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        model.zero_grad()
        x = X.clone().requires_grad_()
        output = run(x)
        output.square().mean().backward()
        found.append([output, x.grad, *[each.grad for each in injection.parameters()]])
    assert fused[:4] == [6, 5, 6, 5]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("frozen", ["A", "B", "AB"])
def test_an_update_is_computed_with_the_layer_whichever_factor_trains(frozen: str, fused: list[int]) -> None:
    model = linears()[:1]
    stir(injection := peftcore.apply(model, "lora", target=["0"]))
    operator = injection.operators["0"]
    for name in frozen:
        getattr(operator, name).requires_grad_(False)
    model(X.clone().requires_grad_()).sum().backward()
    assert fused == [6]
    assert {name for name, each in operator.named_parameters() if each.grad is None} == set(frozen)


def test_an_update_of_a_layer_that_trains_leaves_it_its_gradient(fused: list[int]) -> None:
    model = linears()
    stir(peftcore.apply(model, "lora", target=["0", "1"]))
    model[1].weight.requires_grad_(True)
    model(X).sum().backward()
    assert fused == [6] and model[1].weight.grad is not None


@pytest.mark.parametrize("method", ["ia3", "hira"])
def test_an_update_around_something_else_is_computed_by_itself(method: str, fused: list[int]) -> None:
    model = linears()
    stir(peftcore.apply(model, method, target=["0"]))
    stir(peftcore.apply(model, "lora", target=["0"]))
    loss = model(X).square().sum()
    assert not fused
    loss.backward()


def test_kinds_of_layers_that_are_not_linear_offer_no_weight_to_such_a_function() -> None:
    modules = nn.Embedding(5000, 20), nn.Conv1d(20, 20, 1), nn.ConvTranspose1d(20, 20, 1)
    for module in modules:
        module.requires_grad_(False)
        call = functools.partial(type(module).forward, module)
        assert dense_layer(module, "weight").frozen_linear(call, torch.ones(2000, 20), 20) is None
    linear = nn.Linear(20, 30).requires_grad_(False)
    layer, call = dense_layer(linear, "weight"), functools.partial(nn.Linear.forward, linear)
    weight, bias = layer.frozen_linear(call, torch.ones(2000, 20), 30) or (None, None)
    assert weight is linear.weight and bias is linear.bias
    assert layer.frozen_linear(call, torch.ones(2, 20), 30) is None, "so little is not worth it"
    assert layer.frozen_linear(linear, torch.ones(2000, 20), 30) is None, "who knows what that does"


def test_weights_that_are_more_than_numbers_multiply_by_themselves(fused: list[int]) -> None:
    class Counted(Tensor):
        pass

    model = linears()
    stir(peftcore.apply(model, "lora", target=["0", "1"]))
    model[0].weight = nn.Parameter(model[0].weight.detach().as_subclass(Counted), requires_grad=False)
    model(X)
    assert fused == [5]


def test_a_subclass_computes_for_itself(fused: list[int]) -> None:
    class Loud(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = nn.Sequential(Loud(4, 6))
    stir(injection := peftcore.apply(model, "lora", target=["0"]))
    (A, B, scale) = next(iter(injection.operators.values())).factors()  # type: ignore[misc]
    expected = 2 * nn.functional.linear(X, model[0].weight + scale * B @ A, model[0].bias)
    torch.testing.assert_close(model(X), expected)
    assert not fused
