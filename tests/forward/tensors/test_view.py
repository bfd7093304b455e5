"""The throw-away view on which a base forward runs."""

from typing import Any

import pytest
import torch
from core_toys import Shift, ShiftOperator, perceptron, snapshot
from torch import Tensor, nn

import peftcore


class Reader(nn.Module):
    """Reads a child's weight and never calls the child."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 6, bias=False)
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(id(self.qkv.weight))
        return nn.functional.linear(x, self.qkv.weight)


class OnNestedTensor(peftcore.author.Method):
    """Acts on a child's tensor through the module that reads it."""

    name = "toy_nested"
    Config = Shift.Config
    tags = Shift.tags
    target = ""

    def inject(self, model: Any, config: Any, surgeon: Any) -> None:
        surgeon.graft(surgeon.resolver.site("reader", "qkv.weight"), ShiftOperator, config)

    @staticmethod
    def parameter_count(site: Any, config: Any) -> int:
        return site.numel


def test_nested_path_reaches_a_weight_that_is_read() -> None:
    model = nn.ModuleDict({"reader": Reader()})
    x = torch.randn(3, 4)
    base, weight, child = model["reader"](x), model["reader"].qkv.weight, model["reader"].qkv
    injection = peftcore.apply(model, OnNestedTensor)
    assert list(injection.operators) == ["reader.qkv.weight"]
    moved = model["reader"](x)
    assert torch.allclose(moved, nn.functional.linear(x, weight + 1), atol=1e-6)
    assert model["reader"].qkv is child and child.weight is weight  # the host itself never sees the effective weight
    assert type(child) is nn.Linear
    injection.remove()
    assert torch.equal(model["reader"](x), base)


def test_attributes_that_forward_sets_reach_the_site() -> None:
    """The view shares lists and other objects; that is what modules with state of their own rely on."""
    model = nn.ModuleDict({"reader": Reader()})
    peftcore.apply(model, OnNestedTensor)
    model["reader"](torch.randn(3, 4))
    assert len(model["reader"].seen) == 1


class Keeper(nn.Module):
    """Keeps what it made of its table, in evaluation, as LeViT does with its biases."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 4))
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if "rows" not in self.cache:
            self.cache["rows"] = self.table[:, [2, 0, 1]]
        return x @ self.cache["rows"].T


@pytest.mark.parametrize("fresh", [True, False])
def test_what_a_module_keeps_of_its_tensors_is_not_taken_for_what_acts(fresh: bool) -> None:
    model, x = nn.ModuleDict({"keeper": Keeper()}), torch.randn(2, 3)
    base = x @ model["keeper"].table[:, [2, 0, 1]].T
    if not fresh:
        model["keeper"](x)
    injection = peftcore.apply(model, Shift, target="keeper.table")
    moved = model["keeper"](x)
    assert torch.allclose(moved, base + x.sum(-1, keepdim=True), atol=1e-6)
    moved.sum().backward()  # where the module runs again
    injection.remove()
    assert torch.equal(model["keeper"](x), base)


class Frozen(nn.Module):
    """A norm as detection models have it: buffers and no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(4).bfloat16())
        self.register_buffer("bias", torch.randn(4).bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.get_buffer("weight") + self.get_buffer("bias")


def test_a_module_without_parameters() -> None:
    model, x = perceptron().bfloat16(), torch.randn(2, 4).bfloat16()
    model.first, model.second = Frozen(), nn.Linear(4, 3).bfloat16()
    base, norm = model(x), model.first(x)
    injection = peftcore.apply(model, Shift, target="first")
    moved = model(x)
    assert moved.dtype == torch.bfloat16 and torch.allclose(model.first(x), norm + x, atol=0.05)
    injection.merge()
    assert torch.equal(model(x), moved)
    injection.remove()
    assert torch.equal(model(x), base)


def test_a_stand_in_computes_with_other_tensors_and_leaves_the_module_alone() -> None:
    """Without what injections do at it; gradients reach what stands in."""
    model, x = nn.ModuleDict({"reader": Reader()}), torch.randn(3, 4)
    peftcore.apply(model, OnNestedTensor)
    reader = model["reader"]
    before, weight = snapshot(model), torch.randn(6, 4, requires_grad=True)
    y = peftcore.author.with_tensors(reader, {"qkv.weight": weight})(x)
    assert torch.equal(y, nn.functional.linear(x, weight))
    y.sum().backward()
    assert weight.grad is not None and reader.qkv.weight.grad is None
    assert snapshot(model) == before
