"""Any storage reads as one logical layout and is written back to the bit; a layer's linear map is the module's own."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from core_toys import Swap, stir
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftcore
from peftcore.errors import UnsupportedSite
from peftcore.layers.detect import dense_layer
from peftcore.layers.kernels import low_rank_linear
from peftcore.layers.kinds import SMALL, Transposed
from peftcore.layers.layer import bias_name, put, take
from peftcore.registry.plugins import layer_of


def gpt_conv1d() -> nn.Module:
    utils = pytest.importorskip("transformers.pytorch_utils")
    return utils.Conv1D(6, 4)


class Stacked(nn.Module):
    """Three matrices in one parameter."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.up_proj = nn.Parameter(torch.randn(3, 4, 6) if transposed else torch.randn(3, 6, 4))


CALLED: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "Linear": (lambda: nn.Linear(4, 6), lambda: torch.randn(2, 3, 4)),
    "Linear without bias": (lambda: nn.Linear(4, 6, bias=False), lambda: torch.randn(4)),
    "GPT-2's Conv1D": (gpt_conv1d, lambda: torch.randn(2, 3, 4)),
    "Embedding": (lambda: nn.Embedding(11, 6), lambda: torch.tensor([[0, 3, 10], [1, 1, 2]])),
    "Embedding with padding": (
        lambda: nn.Embedding(11, 6, padding_idx=3),
        lambda: torch.tensor([[0, 3, 10], [1, 1, 2]]),
    ),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), lambda: torch.randn(2, 4, 9)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), dilation=2), lambda: torch.randn(2, 4, 9, 8)),
    "Conv2d, same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), lambda: torch.randn(2, 4, 5, 5)),
    "Conv2d, pointwise, no bias": (lambda: nn.Conv2d(4, 6, 1, bias=False), lambda: torch.randn(2, 4, 5, 5)),
    "Conv2d without a batch": (lambda: nn.Conv2d(4, 6, 3), lambda: torch.randn(4, 5, 5)),
    "Conv3d": (lambda: nn.Conv3d(2, 6, 2, padding=1), lambda: torch.randn(2, 2, 3, 4, 5)),
}
READ: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "grouped Conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), "weight", (6, 2, 3, 3)),
    "depthwise Conv1d": (lambda: nn.Conv1d(4, 8, 3, groups=4), "weight", (8, 1, 3)),
    "reflecting Conv2d": (lambda: nn.Conv2d(4, 6, 3, padding_mode="reflect"), "weight", (6, 4, 3, 3)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3), "weight", (6, 4, 3)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, (3, 2)), "weight", (6, 4, 3, 2)),
    "grouped ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), "weight", (6, 2, 3, 3)),
    "LayerNorm": (lambda: nn.LayerNorm(6), "weight", (6,)),
    "bias": (lambda: nn.Linear(4, 6), "bias", (6,)),
    "packed projection": (lambda: nn.MultiheadAttention(4, 2), "in_proj_weight", (12, 4)),
    "tensor of a child": (lambda: nn.MultiheadAttention(4, 2), "out_proj.weight", (4, 4)),
    "convolution of a child": (lambda: nn.Sequential(nn.Conv1d(6, 6, 3, groups=6)), "0.weight", (6, 1, 3)),
    "table of a child": (lambda: nn.Sequential(nn.Embedding(11, 6)), "0.weight", (6, 11)),
    "experts": (lambda: Stacked(False), "up_proj", (3, 6, 4)),
    "transposed experts": (lambda: Stacked(True), "up_proj", (3, 6, 4)),
    "Embedding with max_norm": (lambda: nn.Embedding(11, 6, max_norm=1.0), "weight", (6, 11)),
}
EVERY = [*((name, make, "weight") for name, (make, _) in CALLED.items()), *((n, m, t) for n, (m, t, _) in READ.items())]


@pytest.mark.parametrize(("name", "make", "tensor"), EVERY, ids=lambda value: value if isinstance(value, str) else "")
def test_logical_layout_round_trips(name: str, make: Callable[[], nn.Module], tensor: str) -> None:
    module = make()
    layer = dense_layer(module, tensor)
    stored = layer.read(module, tensor)
    assert stored is not None
    logical = layer.logical(stored)
    assert torch.equal(layer.stored(logical), stored)
    assert logical.shape == layer.shape(module, tensor)
    assert logical.numel() == stored.numel()
    replaced = torch.randn_like(logical)
    layer.write(module, tensor, layer.stored(replaced))
    assert torch.equal(layer.logical(layer.read(module, tensor)), replaced)


@pytest.mark.parametrize("name", CALLED)
def test_linear_map_of_the_layer_is_the_modules_forward_without_bias(name: str) -> None:
    make, inputs = CALLED[name]
    module, x = make(), inputs()
    layer = layer_of(module, "weight")
    assert layer.called
    expected = module(x)
    bias = getattr(module, "bias", None)
    if bias is not None:
        expected = expected - layer.along_channels(bias, expected)
    actual = layer.apply(x, layer.logical(module.weight))
    assert torch.allclose(actual, expected, atol=1e-6) and actual.shape == expected.shape


@pytest.mark.parametrize("name", CALLED)
@pytest.mark.parametrize("rank", [1, 2])
def test_two_factors_are_the_linear_map_of_their_product(name: str, rank: int) -> None:
    """What low-rank adapters rely on: apply(A), then add with B, equals apply(B A)."""
    make, inputs = CALLED[name]
    module, x = make(), inputs()
    layer = layer_of(module, "weight")
    weight = layer.logical(module.weight.detach())
    A, B = torch.randn(rank, *weight.shape[1:]), torch.randn(weight.shape[0], rank)
    y = module(x)
    product = (B @ A.flatten(1)).view(weight.shape)
    expected = y + 0.5 * layer.apply(x, product)
    assert torch.allclose(layer.add(y, layer.apply(x, A), B, 0.5), expected, atol=1e-5)


@pytest.mark.parametrize("name", CALLED)
def test_rows_of_the_weight_are_channels_of_the_output(name: str) -> None:
    make, inputs = CALLED[name]
    module, x = make(), inputs()
    layer = layer_of(module, "weight")
    weight = layer.logical(module.weight.detach())
    whole = layer.apply(x, weight)
    part = layer.apply(x, take(weight, ((1, 3),), 0))
    assert torch.allclose(take(whole, ((1, 3),), layer.channel_dim), part, atol=1e-6)
    scale = torch.arange(1.0, weight.shape[0] + 1)
    scaled = layer.apply(x, weight * scale.view(-1, *[1] * (weight.dim() - 1)))
    assert torch.allclose(whole * layer.along_channels(scale, whole), scaled, atol=1e-5)


@pytest.mark.parametrize("name", READ)
def test_what_is_only_read_has_a_layout_and_no_linear_map(name: str) -> None:
    make, tensor, shape = READ[name]
    module = make()
    layer = dense_layer(module, tensor)
    assert not layer.called
    assert tuple(layer.shape(module, tensor)) == shape
    assert layer.batch_dims == (1 if "experts" in name else 0)


def test_layer_without_a_linear_map_says_so() -> None:
    layer = dense_layer(nn.LayerNorm(4), "weight")
    with pytest.raises(UnsupportedSite):
        layer.apply(torch.randn(2, 4), torch.randn(4))
    with pytest.raises(UnsupportedSite):
        layer.add(torch.randn(2, 4), torch.randn(2, 1), torch.randn(4, 1), 1.0)


@pytest.mark.parametrize("groups", [1, 2])
def test_logical_weight_of_a_transposed_convolution_maps_inputs_to_outputs(groups: int) -> None:
    """One input pixel in, its kernel out: entry [o, i] of the logical weight at the kernel position."""
    module = nn.ConvTranspose2d(4, 6, 1, groups=groups, bias=False)
    layer = dense_layer(module, "weight")
    logical = layer.logical(module.weight)[..., 0, 0]  # [out, in / groups]
    dense = torch.block_diag(*logical.chunk(groups, 0))
    x = torch.randn(2, 4, 1, 1)
    assert torch.allclose(module(x)[..., 0, 0], x[..., 0, 0] @ dense.T, atol=1e-6)


@pytest.mark.parametrize("scaled", [False, True])
def test_embedding_with_a_forward_of_its_own_is_not_called_through(scaled: bool) -> None:
    class Scaled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 3

    module = Scaled(5, 4) if scaled else nn.Embedding(5, 4)
    assert dense_layer(module, "weight").called is not scaled


@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
def test_subclass_with_a_forward_of_its_own_is_not_called_through(kind: str) -> None:
    """`called` says that the module computes its linear map plus bias and no more; subclasses may differ."""

    class Halved(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) / 2

    class Standardized(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return nn.functional.conv2d(input, weight, self.bias)

    module, x = (
        (Halved(4, 6), torch.randn(2, 4)) if kind == "Linear" else (Standardized(4, 6, 3), torch.randn(2, 4, 5, 5))
    )
    host = nn.ModuleDict({"inner": module})
    injection = peftcore.apply(host, "lora", target="inner")
    stir(injection, 0.5)
    acting = module(x)
    injection.merge()
    assert torch.allclose(module(x), acting, atol=1e-5)


def test_class_is_found_below_grafts_and_parametrizations() -> None:
    module = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
    assert dense_layer(module, "weight").called
    table = nn.utils.parametrizations.weight_norm(nn.Embedding(5, 4))
    assert dense_layer(table, "weight").called
    host = nn.ModuleDict({"inner": nn.Embedding(5, 4)})
    peftcore.apply(host, Swap, target="inner")
    assert dense_layer(host["inner"], "weight").called


def test_missing_slots_read_as_none() -> None:
    module = nn.Linear(4, 6, bias=False)
    assert dense_layer(module, "bias").read(module, "bias") is None
    assert dense_layer(module, "nothing").read(module, "nothing") is None


@pytest.mark.parametrize(
    ("tensor", "bias"),
    [
        ("weight", "bias"),
        ("in_proj_weight", "in_proj_bias"),
        ("out_proj.weight", "out_proj.bias"),
        ("gate_up_proj", "gate_up_proj_bias"),
    ],
)
def test_bias_that_belongs_to_a_weight(tensor: str, bias: str) -> None:
    assert bias_name(tensor) == bias


@pytest.mark.parametrize(
    ("shapes", "turned"),
    [
        (((3, 4, 10), (3, 5, 4)), True),  # gates with their inputs, and the way back, stored by inputs
        (((3, 10, 4), (3, 4, 5)), False),  # and by outputs
        (((3, 4, 10), (2, 5, 4)), False),  # not as many
        (((3, 4, 4), (3, 4, 4)), False),
    ],
)
def test_two_stacks_tell_how_they_are_stored(shapes: tuple[tuple[int, ...], ...], turned: bool) -> None:
    module = nn.Module()
    for name, shape in zip(("first", "second"), shapes, strict=True):
        module.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    assert [isinstance(dense_layer(module, name), Transposed) for name in ("first", "second")] == [turned] * 2
    module.is_transposed = not turned
    assert isinstance(dense_layer(module, "first"), Transposed) is not turned, "what it declares holds"


def test_layers_are_plain_data() -> None:
    layer = layer_of(nn.Conv2d(4, 6, 3, stride=2), "weight")
    assert copy.deepcopy(layer) == layer and hash(layer) == hash(copy.deepcopy(layer))
    assert layer != layer_of(nn.Conv2d(4, 6, 3), "weight")


# rows


@st.composite
def cut(draw: st.DrawFn) -> tuple[Tensor, tuple[tuple[int, int], ...], int]:
    """A tensor, half-open ranges in order of one of its dimensions, and that dimension."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    edges = (
        draw(st.lists(st.integers(0, shape[dim]), min_size=2, max_size=6, unique=True).map(sorted))
        if shape[dim]
        else [0, 1]
    )
    edges = edges[: len(edges) // 2 * 2]
    ranges = tuple(zip(edges[::2], edges[1::2], strict=True))
    return torch.randn(shape), ranges, dim


@settings(max_examples=60, deadline=None)
@given(cut())
def test_put_then_take_gives_the_part(case: Any) -> None:
    tensor, ranges, dim = case
    part = torch.randn_like(take(tensor, ranges, dim))
    assert part.shape[dim] == sum(stop - start for start, stop in ranges)
    changed = put(tensor, part, ranges, dim)
    assert changed.shape == tensor.shape
    assert torch.equal(take(changed, ranges, dim), part)
    inside = torch.zeros(tensor.shape[dim], dtype=torch.bool)
    for start, stop in ranges:
        inside[start:stop] = True
    rest = (~inside).nonzero().flatten()
    assert torch.equal(changed.index_select(dim, rest), tensor.index_select(dim, rest))


@settings(max_examples=60, deadline=None)
@given(cut())
def test_take_then_put_changes_nothing(case: Any) -> None:
    tensor, ranges, dim = case
    kept = tensor.clone()
    assert torch.equal(put(tensor, take(tensor, ranges, dim), ranges, dim), tensor)
    assert torch.equal(tensor, kept)


@settings(max_examples=30, deadline=None)
@given(cut())
def test_take_is_the_rows_in_order(case: Any) -> None:
    tensor, ranges, dim = case
    rows = [index for start, stop in ranges for index in range(start, stop)]
    assert torch.equal(take(tensor, ranges, dim), tensor.index_select(dim, torch.tensor(rows)))


def test_no_ranges_are_the_whole() -> None:
    tensor, part = torch.randn(3, 4), torch.randn(3, 4)
    assert take(tensor, None, 0) is tensor and put(tensor, part, None, 0) is part


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([1, 2, 3]), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_grouped_transposed_convolutions_round_trip(groups: int, outputs: int, inputs: int, kernel: int) -> None:
    module = nn.ConvTranspose1d(inputs * groups, outputs * groups, kernel, groups=groups)
    layer = dense_layer(module, "weight")
    assert tuple(layer.shape(module, "weight")) == (outputs * groups, inputs, kernel)
    assert torch.equal(layer.stored(layer.logical(module.weight)), module.weight)


# the update of a linear layer in one


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
