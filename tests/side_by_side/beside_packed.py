"""The life of a low-rank update beside a packed weight, whichever way it came there: the helper of the tests of methods
that take something out of a weight before it is packed, or put something back."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft_pairs import MOVED, OUTPUTS, difference
from torch import Tensor, nn

import peftcore
from peftcore.injection.injection import Injection
from peftcore.registry.plugins import layer_of

PACKAGES = {"nf4": (), "bnb-nf4": ("bitsandbytes",), "int8": (), "torchao-int8": ("torchao",), "hqq-4": ("hqq",)}
"""The schemes on which the methods are tried, with what they need."""
WIDTH, HIDDEN = 64, 128


def host() -> tuple[nn.Module, Tensor]:
    """Two linear layers that every scheme takes, always the same, and an input. Their largest singular values lie far
    apart, so that every algorithm finds the same directions."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, WIDTH, bias=False))
        for layer in (model[0], model[2]):
            U, S, V = torch.linalg.svd(layer.weight, full_matrices=False)
            S[:6] *= torch.linspace(2, 1, 6)
            layer.weight.copy_(U * S @ V)
        return model.requires_grad_(False), torch.randn(3, 5, WIDTH)


def packed(scheme: str, model: nn.Module | None = None) -> nn.Module:
    """The host packed; a test is passed over where a package is missing."""
    for package in PACKAGES[scheme]:
        pytest.importorskip(package)
    return peftcore.quantize(host()[0] if model is None else model, scheme)


@torch.no_grad()
def fill(injection: Injection) -> None:
    """Everything that trains becomes N(0, 0.1), always the same."""
    generator = torch.Generator().manual_seed(1)
    for parameter in injection.parameters():
        parameter.normal_(0, 0.1, generator=generator)


def by_equation(model: nn.Module, injection: Injection, x: Tensor) -> Tensor:
    """What a base packed by others computes: (round(W) - s B0 A0 + s B A) x, in float64."""
    for path, module in model.named_children():
        if isinstance(module, nn.Tanh):
            x = x.tanh()
            continue
        operator: Any = injection.operators[path]
        tensors = {name: t.detach().double() for name, t in operator.state_dict().items()}
        change = tensors["B"] @ tensors["A"]
        if "A0" in tensors:
            change = change - tensors["B0"] @ tensors["A0"]
        weight = layer_of(module, "weight").read(module, "weight")
        bias = None if module.bias is None else module.bias.detach().double()
        x = F.linear(x.double(), weight.detach().double() + operator.scale * change, bias)
    return x


def assert_trains(injection: Injection, x: Tensor) -> Tensor:
    """Every tensor gets a gradient, a step moves each, and training computes what evaluation does. Gives the output
    afterwards."""
    injection.trainable()
    model = injection.model.train()
    model(x).square().sum().backward()
    before = {id(parameter): parameter.detach().clone() for parameter in injection.parameters()}
    for parameter in injection.parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, "a tensor gets no gradient"
    injection.optimizer(torch.optim.SGD, lr=1e-3).step()
    assert all((before[id(parameter)] != parameter).any() for parameter in injection.parameters())
    trained: Tensor = model(x).detach()
    assert difference(model.eval()(x), trained) <= OUTPUTS
    return trained


@torch.no_grad()
def assert_merges(injection: Injection, x: Tensor, expected: Tensor) -> None:
    """Into floating point, to the same output."""
    injection.merge()
    assert difference(injection.model(x), expected) <= OUTPUTS


def assert_from_dense(scheme: str, method: str, folder: Path, **options: Any) -> None:
    """Applied to a dense host: it trains there; the file fits dense hosts, those that are packed afterwards, and those
    that others have packed; all of these train on, and merge."""
    (model, x), theirs = host(), packed(scheme)
    injection = peftcore.apply(model, method, target=["0", "2"], scheme=scheme, seed=0, **options)
    fill(injection)
    assert difference(model(x), host()[0](x)) >= MOVED, "the adapter hardly moved the output"
    expected = assert_trains(injection, x)
    injection.save(folder)

    again = peftcore.load(host()[0], folder)
    assert difference(again.model(x), expected) <= OUTPUTS
    ours = peftcore.load(host()[0], folder)
    packed(scheme, ours.model)
    assert all(layer_of(ours.model[index], "weight").packed for index in (0, 2))
    assert difference(ours.model(x), expected) <= OUTPUTS, "packed afterwards, other numbers"
    beside = peftcore.load(deepcopy(theirs), folder)
    wanted = by_equation(theirs, beside, x)
    assert difference(beside.model(x), wanted) <= OUTPUTS

    assert_merges(again, x, expected)
    for each in (ours, beside):
        assert_merges(each, x, assert_trains(each, x))


def assert_from_packed(scheme: str, method: str, folder: Path, **options: Any) -> Injection:
    """Applied to a packed host: it changes nothing at first, trains, computes its equation, merges, and the file fits
    such hosts. Gives the injection as it starts."""
    base, x = packed(scheme), host()[1]
    fresh = peftcore.apply(deepcopy(base), method, target=["0", "2"], scheme="nf4", seed=0, **options)
    assert difference(fresh.model(x), base(x)) <= OUTPUTS
    injection = peftcore.apply(deepcopy(base), method, target=["0", "2"], scheme="nf4", seed=0, **options)
    fill(injection)
    wanted = by_equation(base, injection, x)
    assert difference(injection.model(x), base(x)) >= MOVED
    assert difference(injection.model(x), wanted) <= OUTPUTS
    expected = assert_trains(injection, x)
    injection.save(folder)
    assert difference(peftcore.load(deepcopy(base), folder).model(x), expected) <= OUTPUTS
    assert_merges(injection, x, expected)
    return fresh
