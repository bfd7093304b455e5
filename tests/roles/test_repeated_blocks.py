"""Blocks are what repeats along the depth: the innermost elements of lists that hold a mixer or a body of their own."""

import pytest
import torch
from core_toys import Layer, transformer
from torch import nn

from peftcore.roles import derive


def blocks(model: nn.Module) -> list[str]:
    return [entry.path for entry in derive(model).entries if entry.role == "block"]


class Residual(nn.Module):
    """Convolutions with a norm, as in a ResNet."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)


def stages() -> nn.Module:
    """Numbered stages, each a list."""
    model = nn.Module()
    model.layer1 = nn.Sequential(Residual(4), Residual(4))
    model.layer2 = nn.Sequential(Residual(4))
    return model


def sublayers() -> nn.Module:
    """Blocks that list their branches, of which one attends, as T5's do."""
    model = nn.Module()
    model.block = nn.ModuleList()
    for _ in range(2):
        block = nn.Module()
        layer = Layer()
        attention, rest = nn.Module(), nn.Module()
        attention.self_attn, attention.norm = layer.self_attn, layer.attn_norm
        rest.mlp, rest.norm = layer.mlp, layer.mlp_norm
        block.layer = nn.ModuleList([attention, rest])
        model.block.append(block)
    return model


def test_layers_of_a_list_are_blocks() -> None:
    assert blocks(transformer(depth=3)) == ["layers.0", "layers.1", "layers.2"]


def test_convolutions_with_norms_make_blocks_of_stages() -> None:
    assert blocks(stages()) == ["layer1.0", "layer1.1", "layer2.0"]


def test_who_lists_branches_is_the_block() -> None:
    assert blocks(sublayers()) == ["block.0", "block.1"]


def test_what_stands_in_one_list_with_a_block_is_one() -> None:
    model = transformer()
    alone = nn.Module()
    alone.mlp = Layer().mlp
    model.layers.append(alone)
    assert blocks(model) == ["layers.0", "layers.1", "layers.2"]


@pytest.mark.parametrize("model", [nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4), nn.ModuleList()])
def test_a_list_of_single_layers_has_none(model: nn.Module) -> None:
    with torch.device("meta"):
        assert blocks(model) == []
