"""A host in the three states in which methods for packed bases meet it, and what must be the same in them: the helper
of the tests of those methods.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_pairs import FILL, GRADIENTS, MOVED, OUTPUTS, difference
from torch import Tensor, nn
from two_layers import Two

import peftcore

KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"double_quant": True},
    "bnb-nf4": {"double_quant": True},
    "int8": {},
    "torchao-int8": {},
    "hqq-4": {},
    "nf4-icq": {"double_quant": True, "tau_steps": 4},
}
SCHEMES = pytest.mark.parametrize("scheme", ["nf4", "bnb-nf4", "int8", "torchao-int8", "hqq-4"])
STATES = ["dense", "quantize", "others"]
TARGET = ["first", "second"]


def two() -> Two:
    """Two linear layers of widths that all formats take."""
    return Two(nn.Linear(64, 128), nn.Linear(128, 64))


def dense() -> Two:
    """The host as it is loaded; always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return two()


def inputs() -> Tensor:
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(2))


def packed(scheme: str) -> Two:
    """The host, packed without knowing of a method."""
    return peftcore.quantize(dense(), scheme, target=TARGET, **KINDS[scheme])


@torch.no_grad()
def fill(injection: peftcore.Injection) -> None:
    """Every tensor that trains becomes N(0, 0.1), always the same."""
    generator = torch.Generator().manual_seed(1)
    for parameter in injection.parameters():
        parameter.normal_(0, FILL, generator=generator)


def adapted(state: str, method: str, scheme: str, **options: Any) -> tuple[Two, peftcore.Injection]:
    """The host in a state, with the method: "dense", packed by "quantize" afterwards, or before by "others"."""
    model = packed(scheme) if state == "others" else dense()
    options = {"scheme": scheme, "scheme_options": KINDS[scheme], **options}
    injection = peftcore.apply(model, method, target=TARGET, seed=0, **options)
    fill(injection)
    if state == "quantize":
        peftcore.quantize(model, scheme, target=TARGET, **KINDS[scheme])
    return model, injection


def gradients(model: nn.Module, parameters: Iterable[nn.Parameter]) -> tuple[Tensor, list[Tensor]]:
    """An output, and the gradient of every tensor that trains for a random direction of it."""
    output = model(inputs())
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    return output.detach(), list(torch.autograd.grad((output * direction).sum(), list(parameters)))


def assert_same(got: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> None:
    assert difference(got[0], expected[0]) <= OUTPUTS
    for ours, theirs in zip(got[1], expected[1], strict=True):
        assert theirs.abs().max() > 0
        assert difference(ours, theirs) <= GRADIENTS


def assert_packed_is_simulated(method: str, scheme: str, **options: Any) -> None:
    """A host that is packed after the method came computes what it did when that was simulated."""
    model, injection = adapted("dense", method, scheme, **options)
    simulated = gradients(model, injection.parameters())
    assert difference(simulated[0], packed(scheme)(inputs())) >= MOVED
    peftcore.quantize(model, scheme, target=TARGET, **KINDS[scheme])
    assert_same(gradients(model, injection.parameters()), simulated)


def assert_trains_and_merges(state: str, method: str, scheme: str, **options: Any) -> None:
    """A step of training, a pass in evaluation, another step as if there had been none; merged, the same output."""
    model, injection = adapted(state, method, scheme, **options)
    before = gradients(model, injection.parameters())
    with torch.no_grad():
        evaluated = model.eval()(inputs())
        assert difference(evaluated, before[0]) <= OUTPUTS
    assert_same(gradients(model.train(), injection.parameters()), before)
    optimizer = torch.optim.SGD(injection.parameters(), lr=0.1)
    old = [parameter.detach().clone() for parameter in injection.parameters()]
    model(inputs()).square().sum().backward()
    optimizer.step()
    assert not any(torch.equal(new, was) for new, was in zip(injection.parameters(), old, strict=True))
    expected = model(inputs()).detach()
    injection.merge(into="float")
    assert type(model.first) is not type(packed(scheme).first) or state == "dense"
    assert difference(model(inputs()), expected) <= OUTPUTS


def assert_saved_fits(path: Path, saved: str, loaded: str, method: str, scheme: str, **options: Any) -> None:
    """What is saved from a host in one state computes the same on a host in another."""
    model, injection = adapted(saved, method, scheme, **options)
    expected = model(inputs()).detach()
    injection.save(path)
    other = packed(scheme) if loaded == "others" else dense()
    peftcore.load(other, path)
    if loaded == "quantize":
        peftcore.quantize(other, scheme, target=TARGET, **KINDS[scheme])
    assert difference(other(inputs()), expected) <= OUTPUTS
