"""What a module computes a tensor from, by torch's own means, and what it is worth now."""

import pytest
import torch
from computed_hosts import WAYS
from torch import Tensor, nn

from peftcore.layers.computed_tensors import by_hook, computation, has_place, parametrized, resting, sources_of
from peftcore.layers.kinds import Linear

X = torch.linspace(-1, 1, 8).view(2, 4)


def linear(way: str) -> nn.Linear:
    torch.manual_seed(0)
    module = nn.Linear(4, 6)
    WAYS[way](module)
    return module.eval()


@pytest.mark.parametrize("way", WAYS)
def test_the_value_is_that_of_the_next_forward(way: str) -> None:
    module = linear(way)
    found = computation(module, "weight")
    assert found is not None and computation(module, "bias") is None and has_place(module, "weight")
    assert {id(each) for each in found.sources} == {id(each) for each in module.parameters()} - {id(module.bias)}
    with torch.no_grad():
        for source in found.sources:
            source.mul_(0.7).add_(0.01)  # since the last forward
        expected = nn.functional.linear(X, found.value(), module.bias)
        stale = "old" in way or "pruned" in way
        assert (by_hook(module, "weight") is None) is not stale
        assert torch.equal(Linear().read(module, "weight"), found.value())
        assert torch.equal(module(X), expected)


@pytest.mark.parametrize("way", ["spectral_norm", "old spectral_norm"])
def test_asking_takes_no_step(way: str) -> None:
    module = linear(way).train()
    before = {name: each.clone() for name, each in module.state_dict().items()}
    found = computation(module, "weight")
    first, second = found.value(), found.value()
    assert torch.equal(first, second) and module.training
    assert all(torch.equal(each, before[name]) for name, each in module.state_dict().items())


def test_modules_rest_and_go_on() -> None:
    module = linear("spectral_norm").train()
    ways = parametrized(module)
    assert list(ways) == ["weight"] and parametrized(nn.Linear(2, 2)) == {}
    ways["weight"][0].eval()
    with resting(ways.values()):
        assert not any(each.training for each in ways["weight"].modules()) and module.training
    assert ways["weight"].training and not ways["weight"][0].training


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(2))
        self.plain = torch.ones(2)

    @property
    def weight(self) -> Tensor:
        return self.table * 2


def test_where_there_is_a_place_for_a_tensor() -> None:
    module = Own()
    assert has_place(module, "table") and has_place(module, "plain") and not has_place(module, "weight")
    assert computation(module, "weight") is None and not has_place(module, "nothing")
    module.register_forward_pre_hook(lambda *_: None)  # it may set the attribute
    assert not has_place(module, "plain") and has_place(module, "table")
    assert has_place(nn.Linear(2, 2, bias=False), "bias")


def test_sources_are_those_of_torchs_hooks() -> None:
    for way in WAYS:
        module = linear(way)
        if by_hook(module, "weight") is not None:
            assert {*module._parameters, *module._buffers} - {"bias"} <= set(sources_of("weight"))
