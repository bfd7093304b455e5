"""The life of a method that is made for a packed base, on hosts that are packed in several formats: the helper of their
tests."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_pairs import MOVED, OUTPUTS, difference
from torch import Tensor, nn

import peftcore

SCHEMES = {"nf4": (), "int8": (), "bnb-nf4": ("bitsandbytes",), "torchao-int8": ("torchao",), "hqq-4": ("hqq",)}
"""Those on which the methods are tried, with what they need."""
WIDTH, HIDDEN = 64, 128


def dense() -> tuple[nn.Module, Tensor]:
    """A host of two linear layers that every scheme takes, always the same, and an input."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, WIDTH, bias=False))
        return model.requires_grad_(False), torch.randn(3, 5, WIDTH)


@torch.no_grad()
def fill(injection: peftcore.Injection) -> None:
    """Everything that trains becomes N(0, 0.1), always the same."""
    generator = torch.Generator().manual_seed(1)
    for parameter in injection.parameters():
        parameter.normal_(0, 0.1, generator=generator)


def assert_lives_on(scheme: str, method: str, folder: Path, **options: Any) -> None:
    """It trains there, computes what it computes on a dense host that is packed afterwards or never, merges into
    floating point, and its files fit both hosts."""
    for package in SCHEMES[scheme]:
        pytest.importorskip(package)
    options = {"target": ["0", "2"], "scheme": scheme, "seed": 0, **options}
    model, x = dense()
    packed = peftcore.quantize(deepcopy(model), scheme)
    base = packed(x)

    trained = peftcore.apply(deepcopy(packed), method, **options)
    fill(trained)
    trained.model.train()
    ours = trained.model(x)
    assert difference(ours, base) >= MOVED, "the adapter hardly moved the output"
    ours.square().sum().backward()
    for path, operator in trained.operators.items():
        for name, parameter in operator.named_parameters():
            assert parameter.grad is not None, f"{path}.{name} gets no gradient"
            assert parameter.grad.abs().max() > 0, f"{path}.{name} gets a gradient of zero"
    before = [parameter.detach().clone() for parameter in trained.parameters()]
    trained.optimizer(torch.optim.SGD, lr=1e-3).step()
    assert all((old != new).any() for old, new in zip(before, trained.parameters(), strict=True)), "nothing was learned"
    with torch.no_grad():
        expected = trained.model.eval()(x)
        assert difference(trained.model.train()(x), expected) <= OUTPUTS

        trained.save(folder)
        for host in (packed, model):  # the other one computes with rounded weights
            loaded = peftcore.load(deepcopy(host), folder)
            assert difference(loaded.model(x), expected) <= OUTPUTS
        peftcore.quantize(loaded.model, scheme)  # dense, then packed
        assert difference(loaded.model(x), expected) <= OUTPUTS

        for injection in (trained, loaded):
            report = injection.merge()
            assert (report.dense, report.repacked) == (("0", "2"), {})
            assert difference(injection.model(x), expected) <= OUTPUTS
