"""A module takes over what another one is and gives it back, and stays the object that it was."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from core_toys import perceptron
from torch import Tensor, nn

import peftcore
from peftcore.errors import MergeError
from peftcore.forward.state.slot import slot_of
from peftcore.injection.quantized_layer import (
    Dense,
    QuantizedBias,
    QuantizedLayer,
    dense_linear,
    floating_dtype,
    quantized_layer_of,
    replace_in_place,
)
from peftcore.utils.journal import Journal

X = torch.linspace(-1, 1, 12).view(3, 4)


class Halves(nn.Module):
    """A linear layer that keeps half of its weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("halved", weight.detach() / 2)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, 2 * self.halved, self.bias)


@dataclass(frozen=True)
class HalvesLayer(QuantizedLayer):
    def unpack(self, module: nn.Module) -> Tensor:
        return 2 * module.halved

    def dtype(self, module: nn.Module) -> torch.dtype | None:
        return torch.float32


def test_a_module_becomes_another_and_comes_back() -> None:
    model = perceptron().train()
    module, weight, bias = model.first, model.first.weight, model.first.bias
    seen: list[Any] = []
    module.register_forward_hook(lambda *_: seen.append(1))
    expected = model(X)
    journal = Journal()
    replace_in_place(journal, module, Halves(weight))
    assert model.first is module and type(module) is Halves and module.bias is bias and module.training
    assert set(module._parameters) == {"bias"} and set(module._buffers) == {"halved"}
    assert torch.equal(model(X), expected) and len(seen) == 2
    journal.undo()
    assert type(module) is nn.Linear and module.weight is weight and module.bias is bias and not module._buffers


def test_an_adapted_module_stays_adapted() -> None:
    model = perceptron()
    peftcore.apply(model, "lora", target="first")
    slot = slot_of(model.first)
    expected = model(X)
    replace_in_place(Journal(), model.first, dense_linear(2 * model.first.weight, torch.float32))
    assert slot_of(model.first) is slot and isinstance(model.first, nn.Linear)
    assert not torch.allclose(model(X), expected)


def test_a_packed_layer_reads_its_weight_and_what_stands_beside_it() -> None:
    model = perceptron()
    expected = model.first.weight.detach().clone()
    replace_in_place(Journal(), model.first, Halves(model.first.weight))
    layer = quantized_layer_of(model.first, "weight", HalvesLayer())
    assert isinstance(layer, HalvesLayer) and layer.packed and layer.called and layer.runs_dense is Dense
    assert torch.equal(layer.read(model.first, "weight"), expected)
    assert tuple(layer.shape(model.first, "weight")) == (6, 4) and layer.like(model.first, "weight").numel() == 0
    assert layer.has(model.first, "weight") and layer.slots(model.first) == ("weight", "bias")
    beside = quantized_layer_of(model.first, "bias", HalvesLayer())
    assert isinstance(beside, QuantizedBias) and beside.like(model.first, "bias") is model.first.bias
    assert quantized_layer_of(model.first, "halved", HalvesLayer()) is None


def test_a_format_packs_only_where_it_says_how() -> None:
    with pytest.raises(MergeError, match="Halves cannot be packed again"):
        HalvesLayer().pack(Halves(torch.ones(3, 4)), torch.ones(3, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_runs_densely_takes_inputs_of_any_dtype(dtype: torch.dtype) -> None:
    assert Dense(4, 3)(X.to(dtype)).dtype is dtype


def test_the_dtype_of_a_host_is_that_of_its_first_matrix() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4).bfloat16())
    assert floating_dtype(model.modules()) is torch.bfloat16
    assert floating_dtype(nn.LayerNorm(4).double().modules()) is torch.float64
    assert floating_dtype([nn.ReLU()]) is torch.float32


def test_a_dense_layer_is_frozen_and_has_a_weight_of_its_own() -> None:
    weight = torch.randn(3, 4, requires_grad=True)
    layer = dense_linear(weight, torch.float32)
    assert torch.equal(layer.weight, weight) and layer.weight.data_ptr() != weight.data_ptr()
    assert not layer.weight.requires_grad and layer.bias is None
