"""Which layer a tensor is: by class, below grafts and parametrizations, and by shape."""

import pytest
import torch
from core_toys import Swap, stir
from layer_toys import READ
from torch import Tensor, nn

import peftcore
from peftcore.errors import UnsupportedSite
from peftcore.layers.detect import dense_layer
from peftcore.layers.kinds import Transposed


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
