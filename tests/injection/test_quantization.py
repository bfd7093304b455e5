"""Packing a host in place by a scheme: all of it or nothing, and by the names that plugins give."""

from typing import Any

import pytest
import torch
from computed_hosts import WAYS
from core_toys import perceptron, snapshot, stir, transformer
from pydantic import ValidationError
from torch import nn

import peftcore
from peftcore.errors import QuantizationError, TargetError, UnsupportedSite
from peftcore.injection.quantization import dequantize, quantize, round_trip, scheme, scheme_key, schemes
from peftcore.layers.computed_tensors import computation

X = torch.linspace(-1, 1, 12).view(3, 4)


def test_a_scheme_has_a_close_name_and_options() -> None:
    assert "int8" in schemes()
    with pytest.raises(QuantizationError, match="did you mean 'int8'"):
        scheme("int_8")
    with pytest.raises(QuantizationError, match="no_such_option"):
        scheme("int8", no_such_option=1)


def test_a_scheme_is_a_value() -> None:
    chosen = scheme("int8")
    assert chosen == scheme("int8")
    with pytest.raises(ValidationError):
        chosen.extra_field = 1
    assert scheme_key("int8", {}) == scheme_key("int8", {})


def test_modules_stay_the_objects_that_they_are() -> None:
    model = transformer()
    queries = [layer.self_attn.q_proj for layer in model.layers]
    assert quantize(model, "int8") is model
    assert [layer.self_attn.q_proj for layer in model.layers] == queries
    assert not any(type(each) is nn.Linear for each in queries) and type(model.classifier) is nn.Linear
    dequantize(model)
    assert all(type(each) is nn.Linear for each in queries)


def test_the_dense_model_is_what_the_codes_stand_for() -> None:
    model = quantize(perceptron(), "int8", target="first")
    expected = model(X)
    torch.testing.assert_close(dequantize(model)(X), expected)
    torch.testing.assert_close(expected, perceptron()(X), rtol=0.05, atol=0.05)
    assert not torch.equal(model.first.weight, perceptron().first.weight)


def test_injections_stay_active() -> None:
    model = perceptron()
    injection = peftcore.apply(model, "lora", target="first")
    with torch.no_grad():
        injection.operators["first"].B.fill_(0.5)
    adapted = model(X)
    quantize(model, "int8", target="first")
    torch.testing.assert_close(model(X), adapted, rtol=0.05, atol=0.05)
    with injection.disabled():
        assert not torch.allclose(model(X), adapted, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("wishes", "error"),
    [
        ({"target": "nowhere"}, TargetError),
        ({"target": "embed_tokens"}, UnsupportedSite),
        ({"target": "layers.0.attn_norm"}, UnsupportedSite),
        ({"exclude": "*"}, TargetError),
    ],
)
def test_what_cannot_be_packed_changes_nothing(wishes: dict[str, str], error: type[Exception]) -> None:
    model = transformer()
    before = snapshot(model)
    with pytest.raises(error):
        quantize(model, "int8", **wishes)
    assert snapshot(model) == before


def test_a_merged_injection_is_in_the_way() -> None:
    model = perceptron()
    peftcore.apply(model, "lora", target="first").merge()
    with pytest.raises(QuantizationError, match="merged into these weights"):
        quantize(model, "int8", target="first")


@pytest.mark.parametrize("way", WAYS)
def test_a_weight_that_is_computed_is_packed_with_its_value(way: str) -> None:
    model, plain = perceptron(), perceptron()
    WAYS[way](model.first)
    expected = model.eval()(X).detach()
    with torch.no_grad():
        plain.first.weight.copy_(computation(model.first, "weight").value())
    quantize(model, "int8", target="re:^first$"), quantize(plain, "int8", target="first")
    assert torch.equal(model(X), plain(X)) and list(model.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(model(X), expected, rtol=0.05, atol=0.05)
    injection = peftcore.apply(model, "lora", target="first")
    stir(injection)
    adapted = model(X)
    injection.merge()
    torch.testing.assert_close(model(X), adapted)
    injection.unmerge()
    assert torch.equal(model(X), adapted)
    dequantize(model)
    assert type(model.first).__name__ == "Linear" and not model.first._forward_pre_hooks


def test_a_weight_that_is_computed_in_a_way_of_its_own_is_not_packed() -> None:
    model = perceptron()
    weight = model.first.weight.detach().clone()
    del model.first.weight
    model.first.weight = weight
    model.first.register_forward_pre_hook(lambda module, args: setattr(module, "weight", 2 * weight))
    before = snapshot(model)
    with pytest.raises(QuantizationError, match="first computes its weight in a custom way"):
        quantize(model, "int8", target="first")
    assert snapshot(model) == before


@pytest.mark.parametrize("into", ["float", "same"])
def test_what_is_merged_is_not_made_dense(into: Any) -> None:
    model = quantize(perceptron(), "int8")
    injection = peftcore.apply(model, "lora", target="first")
    stir(injection)
    injection.merge(into=into)
    expected = model(X)
    with pytest.raises(QuantizationError, match="merged into these weights"):
        dequantize(model)
    assert torch.equal(model(X), expected)
    injection.bake()
    torch.testing.assert_close(dequantize(model)(X), expected)


def test_gradients_pass_a_round_trip() -> None:
    weight = torch.randn(6, 64, requires_grad=True)
    rounded = round_trip(weight, scheme_key("int8", {}))
    rounded.backward(torch.full_like(weight, 2.0))
    assert not torch.equal(rounded, weight) and torch.allclose(rounded, weight, atol=0.05)
    assert weight.grad is not None and torch.equal(weight.grad, torch.full_like(weight, 2.0))
