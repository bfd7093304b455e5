"""A grafted site keeps its identity."""

import inspect
from typing import Any

import pytest
import torch
from core_toys import (
    Doubling,
    Shift,
    Swap,
    TiedLanguageModel,
    perceptron,
    snapshot,
    stir,
    transformer,
)
from torch import nn

import peftcore


@pytest.mark.parametrize("method", [Doubling, Shift, Swap], ids=lambda method: method.name)
def test_identity_of_the_site(method: Any) -> None:
    model = perceptron()
    plain, signature, keys = type(model.first), inspect.signature(model.first.forward), list(model.first.state_dict())
    parameters = [(name, id(value)) for name, value in model.first.named_parameters()]
    injection = peftcore.apply(model, method, target="first")
    site = model.first
    assert (
        type(site).__name__ == "Linear"
        and type(site).__qualname__ == "Linear"
        and type(site).__module__ == plain.__module__
    )
    assert isinstance(site, nn.Linear)
    assert inspect.signature(site.forward) == signature and not hasattr(type(site).forward, "__wrapped__")
    assert list(site.state_dict()) == keys
    assert [(name, id(value)) for name, value in site.named_parameters()] == parameters
    assert not list(site.children()) and site.in_features == 4
    assert repr(site) == "Linear(in_features=4, out_features=6, bias=True)"
    injection.remove()
    assert type(model.first) is plain


def test_order_of_the_hosts_own_keys_and_parameters_stays() -> None:
    model = transformer()
    keys, parameters = list(model.state_dict()), [name for name, _ in model.named_parameters()]
    peftcore.apply(model, "lora", train=["classifier"])
    assert [key for key in model.state_dict() if ".peft." not in key and not key.startswith("peft.")] == keys
    assert [n for n, _ in model.named_parameters() if ".peft." not in n and not n.startswith("peft.")] == parameters


def test_one_class_stands_for_each_base_class() -> None:
    model = transformer()
    peftcore.apply(model, "lora")
    other = perceptron()
    peftcore.apply(other, Shift, target="first")
    classes = {type(layer.self_attn.q_proj) for layer in model.layers} | {type(other.first)}
    assert len(classes) == 1
    assert type(other.second) is nn.Linear


def test_sequential_host_is_still_a_sequence() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(3, 4)
    base = model(x)
    before = snapshot(model)
    injection = peftcore.apply(model, "lora", target=nn.Linear)
    assert len(model) == 3 and [type(part).__name__ for part in model] == ["Linear", "ReLU", "Linear"]
    assert torch.allclose(model(x), base, atol=1e-6)
    stir(injection)
    assert not torch.allclose(model(x), base, atol=1e-3)
    injection.remove()
    assert snapshot(model) == before and torch.equal(model(x), base)


@pytest.mark.parametrize("method", [Shift, "lora", "dora", "bitfit"], ids=str)
def test_host_may_be_one_bare_layer(method: Any) -> None:
    model = nn.Linear(4, 6)
    x = torch.randn(3, 4)
    before, base = snapshot(model), model(x)
    injection = peftcore.apply(model, method, target=nn.Linear)
    stir(injection)
    assert isinstance(model, nn.Linear) and list(model.state_dict())[:2] == ["weight", "bias"]
    assert all(key.startswith("peft.") for key in list(model.state_dict())[2:])
    assert not torch.allclose(model(x), base, atol=1e-3)
    injection.remove()
    assert snapshot(model) == before and torch.equal(model(x), base)


def test_tied_modules_are_one_site() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    model["b"] = model["a"]
    injection = peftcore.apply(model, Shift, target=nn.Linear)
    assert list(injection.operators) == ["a"]
    x = torch.randn(2, 4)
    assert torch.equal(model["a"](x), model["b"](x))


def test_tied_weights_stay_tied() -> None:
    model = TiedLanguageModel()
    injection = peftcore.apply(model, "lora", target="inner")
    assert model.lm_head.weight is model.embed_tokens.weight
    injection.remove()
    assert model.lm_head.weight is model.embed_tokens.weight


def test_hooks_of_the_user_on_a_site_still_run() -> None:
    model, x = perceptron(), torch.randn(3, 4, requires_grad=True)
    seen: list[str] = []
    model.first.register_forward_pre_hook(lambda module, args: seen.append("before"))
    model.first.register_forward_hook(lambda module, args, output: seen.append("after"))
    injection = peftcore.apply(model, Shift, target="first")
    model.first.register_forward_hook(lambda module, args, output: seen.append("later"))
    model.first.register_full_backward_hook(lambda module, inputs, outputs: seen.append("backward"))
    output = model(x)
    assert seen == ["before", "after", "later"]
    output.sum().backward()
    assert seen[-1] == "backward"
    injection.remove()
    seen.clear()
    model(x)
    assert seen == ["before", "after", "later"]


def test_site_moved_into_another_model_without_its_host_runs_bare() -> None:
    """A missing slot is tolerated: the class alone is the base class."""
    model = perceptron()
    peftcore.apply(model, Shift, target="first")
    lone = object.__new__(type(model.first))
    lone.__dict__.update({key: value for key, value in model.first.__dict__.items() if key != "_peftcore_slot"})
    x = torch.randn(2, 4)
    assert torch.equal(lone(x), nn.functional.linear(x, model.first.weight, model.first.bias))
