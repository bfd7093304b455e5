"""Models that cannot be adapted are refused as a method is recorded, and nothing has changed."""

import functools

import pytest
import torch
from core_toys import (
    perceptron,
    snapshot,
)
from torch import nn

import peftcore
from peftcore.errors import (
    TargetError,
    UnsupportedHost,
    UnsupportedSite,
)


def test_instance_level_forward_is_refused() -> None:
    model = perceptron()
    model.first.forward = functools.partial(nn.Linear.forward, model.first)
    before = snapshot(model)
    with pytest.raises(UnsupportedSite, match="set on the instance"):
        peftcore.apply(model, "lora", target="first")
    assert snapshot(model) == before
    peftcore.apply(model, "lora", target="second")


def test_data_parallel_and_torchscript_are_refused() -> None:
    with pytest.raises(UnsupportedHost, match="DistributedDataParallel"):
        peftcore.apply(nn.DataParallel(perceptron()), "lora", target="first")
    scripted = torch.jit.trace(perceptron(), torch.randn(1, 4))
    with pytest.raises(UnsupportedHost, match="TorchScript"):
        peftcore.apply(scripted, "lora", target="first")


def test_host_with_a_scripted_part_can_be_adapted_elsewhere() -> None:
    model = perceptron()
    model.second = torch.jit.script(model.second)
    before = snapshot(model)
    with pytest.raises((TargetError, UnsupportedHost, UnsupportedSite)):
        peftcore.apply(model, "lora", target="second")
    assert snapshot(model) == before
    injection = peftcore.apply(model, "lora", target="first")
    model(torch.randn(2, 4)).sum().backward()
    injection.remove()
    assert snapshot(model)["modules"] == before["modules"]


def test_weights_that_are_cut_apart_as_they_are_made_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.empty(0))
    with pytest.raises(UnsupportedHost, match="some weights have shape"):
        peftcore.apply(model, "lora", target="0")
