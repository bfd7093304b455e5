"""Whoever writes to weights, by whatever means, the next evaluation sees it: also writers that torch does not count."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import peftcore
from peftcore.author import Site
from peftcore.testing import HOSTS, Case

CASES: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    **{method: (method, "mlp", {}) for method in ("dora", "oft", "hra", "boft", "loha", "lokr", "hira", "vera")},
    "fourierft": ("fourierft", "mlp", {"n_frequency": 20}),
    "lora on experts": ("lora", "moe", {}),
    "lora on attention": ("lora", "encoder", {}),
}
Writer = Callable[[list[nn.Parameter]], None]


def through_data(parameters: list[nn.Parameter]) -> None:
    """As EMA does (`EMAModel.copy_to`)."""
    for each in parameters:
        each.data.copy_(each.data * 1.25)


def through_numpy(parameters: list[nn.Parameter]) -> None:
    for each in parameters:
        array = each.detach().numpy()
        np.multiply(array, np.float64(1.25).astype(array.dtype), out=array)


def through_dlpack(parameters: list[nn.Parameter]) -> None:
    for each in parameters:
        torch.from_dlpack(each.detach()).mul_(1.25)


def to_the_storage(parameters: list[nn.Parameter]) -> None:
    for each in parameters:
        each.untyped_storage().copy_((each.detach() * 1.25).contiguous().untyped_storage())


def other_data_twice(parameters: list[nn.Parameter]) -> None:
    """The second tensor may come to lie where the first one was."""
    for each in parameters:
        each.data = each.data * 5
        each.data = each.data / 4


def from_one_vector(parameters: list[nn.Parameter]) -> None:
    """As a zeroth-order loop does, again and again."""
    for _ in range(3):
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(parameters) * 1.1, parameters)


def fused(parameters: list[nn.Parameter]) -> None:
    """A step of the optimizer that transformers takes by default, on a view that the parameter does not know."""
    views = [nn.Parameter(each.data.view(each.shape)) for each in parameters]
    for view in views:
        view.grad = torch.ones_like(view)
    torch.optim.AdamW(views, lr=0.1, fused=True).step()


WRITERS = (through_data, through_numpy, through_dlpack, to_the_storage, other_data_twice, from_one_vector, fused)


@pytest.mark.parametrize("whose", ["adapter", "base"])
@pytest.mark.parametrize("name", CASES)
def test_evaluation_follows_every_writer(name: str, whose: str) -> None:
    method, host, options = CASES[name]
    case = Case(peftcore.method(method), HOSTS[host], options)
    (model, inputs), (fresh, _) = case.fresh(), case.fresh()
    injection = case.filled(model)
    case.apply(fresh)
    written = list(injection.parameters())
    if whose == "base":
        written = [*{id(each): each for site in injection.sites for each in [_held(site)]}.values()]
    for writer in WRITERS:
        before = case.quiet(model, inputs)
        writer(written)
        fresh.load_state_dict(model.state_dict())
        expected = case.quiet(fresh, inputs)
        assert not torch.equal(before, expected), f"{writer.__name__} changes nothing"
        assert torch.equal(case.quiet(model, inputs), expected), writer.__name__


def _held(site: Site) -> nn.Parameter:
    return site.module.get_parameter(site.tensor)
