"""The walk over a host: what is a linear layer by any other name, what is no part of the host, and what is odd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from host_zoo import build
from torch import nn

from peftcore.roles import derive

torch.set_num_threads(1)


class Tiny(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11)


class QuantizedLayer(nn.Module):
    """Says of itself how large it is."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.register_buffer("packed", torch.zeros(inputs * outputs // 2, dtype=torch.uint8))


class PackedInRows(nn.Module):
    """Works out how large it is."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("packed", torch.zeros(outputs, inputs // 2, dtype=torch.uint8))

    @property
    def in_features(self) -> int:
        return 2 * self.packed.shape[1]

    @property
    def out_features(self) -> int:
        return len(self.packed)


@pytest.mark.parametrize("packed", [QuantizedLayer, PackedInRows])
def test_a_linear_by_any_other_name(packed: Callable[[int, int], nn.Module]) -> None:
    """A packed weight has no telling shape; what declares in_features and out_features is a matrix."""

    def block() -> nn.Module:
        sizes = {"q_proj": 8, "k_proj": 4, "v_proj": 4, "o_proj": 8}
        attention = nn.ModuleDict({name: packed(8, width) for name, width in sizes.items()})
        return nn.ModuleDict({"attn": attention, "up": packed(8, 32), "down": packed(32, 8)})

    host = derive(Tiny([block(), block()]))
    roles = {entry.path: entry.role for entry in host.entries}
    assert roles["blocks.1.attn.q_proj"] == "attn.q"
    assert roles["blocks.1.attn.o_proj"] == "attn.out"
    assert (roles["blocks.1.up"], roles["blocks.1.down"]) == ("mlp.up", "mlp.down")
    assert host.at("blocks.0.attn.k_proj")[0].shape == (4, 8)


def test_guests_are_no_part_of_the_host() -> None:
    """Operators live under `peft`; a parametrized weight keeps the role of its module."""
    model, _ = build("llama")
    plain = derive(model)
    attention = model.get_submodule("model.layers.0.self_attn")
    attention.add_module("peft", nn.ModuleDict({"q_proj": nn.Linear(48, 8)}))
    nn.utils.parametrize.register_parametrization(attention.get_submodule("q_proj"), "weight", nn.Identity())
    assert derive(model) == plain


def test_odd_hosts_do_not_trip_the_walk() -> None:
    """Hosts on the meta device, lazy modules and containers without parameters do not trip the walk."""
    with torch.device("meta"):
        assert derive(Tiny([])).at("head")[0].role == "head"
    assert derive(nn.Sequential(nn.LazyLinear(3), nn.ReLU())).select("all-linear") == []
    assert derive(nn.Identity()).roles() == frozenset()
