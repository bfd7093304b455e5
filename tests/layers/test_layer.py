"""What all layers share: parts of tensors, biases that belong to weights, slots that are missing."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from peftcore.layers.detect import dense_layer
from peftcore.layers.layer import bias_name, put, take
from peftcore.registry.plugins import layer_of


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


def test_layers_are_plain_data() -> None:
    layer = layer_of(nn.Conv2d(4, 6, 3, stride=2), "weight")
    assert copy.deepcopy(layer) == layer and hash(layer) == hash(copy.deepcopy(layer))
    assert layer != layer_of(nn.Conv2d(4, 6, 3), "weight")


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


@pytest.mark.parametrize(
    ("module", "x", "rows"),
    [
        (nn.Linear(4, 6), torch.randn(2, 5, 4), 2),
        (nn.Conv1d(4, 6, 1), torch.randn(2, 4, 5), 2),
        (nn.Conv2d(4, 6, 1), torch.randn(2, 4, 3, 5), 2),
        (nn.Conv3d(4, 6, 1), torch.randn(4, 2, 3, 5), 1),
    ],
    ids=["linear", "conv1d", "conv2d", "conv3d without a batch"],
)
def test_channels_go_last_and_back(module: nn.Module, x: Tensor, rows: int) -> None:
    """The vectors of a pointwise layer are those of a linear one with its weight."""
    layer, y = layer_of(module, "weight"), module(x)
    vectors = layer.channels_last(x) @ module.weight.reshape(6, 4).T + module.bias
    torch.testing.assert_close(layer.channels_back(vectors), y)
    assert torch.equal(layer.channels_back(layer.channels_last(y)), y)
    assert layer.rows(x) == layer.rows(y) == rows
