"""Every kind of layer reads as one logical layout and is written back to the bit; its linear map is the module's."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_toys import CALLED, READ
from torch import nn

from peftcore.layers.detect import dense_layer
from peftcore.layers.layer import take
from peftcore.registry.plugins import layer_of

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


@pytest.mark.parametrize("groups", [1, 2])
def test_logical_weight_of_a_transposed_convolution_maps_inputs_to_outputs(groups: int) -> None:
    """One input pixel in, its kernel out: entry [o, i] of the logical weight at the kernel position."""
    module = nn.ConvTranspose2d(4, 6, 1, groups=groups, bias=False)
    layer = dense_layer(module, "weight")
    logical = layer.logical(module.weight)[..., 0, 0]  # [out, in / groups]
    dense = torch.block_diag(*logical.chunk(groups, 0))
    x = torch.randn(2, 4, 1, 1)
    assert torch.allclose(module(x)[..., 0, 0], x[..., 0, 0] @ dense.T, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([1, 2, 3]), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_grouped_transposed_convolutions_round_trip(groups: int, outputs: int, inputs: int, kernel: int) -> None:
    module = nn.ConvTranspose1d(inputs * groups, outputs * groups, kernel, groups=groups)
    layer = dense_layer(module, "weight")
    assert tuple(layer.shape(module, "weight")) == (outputs * groups, inputs, kernel)
    assert torch.equal(layer.stored(layer.logical(module.weight)), module.weight)
