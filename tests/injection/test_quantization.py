"""Packing a host in place by a scheme: all of it or nothing, and by the names that plugins give."""

import pytest
import torch
from core_toys import perceptron, snapshot, transformer
from pydantic import ValidationError
from torch import nn

import peftcore
from peftcore.errors import QuantizationError, TargetError, UnsupportedSite
from peftcore.injection.quantization import dequantize, quantize, round_trip, scheme, scheme_key, schemes

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


def test_gradients_pass_a_round_trip() -> None:
    weight = torch.randn(6, 64, requires_grad=True)
    rounded = round_trip(weight, scheme_key("int8", {}))
    rounded.backward(torch.full_like(weight, 2.0))
    assert not torch.equal(rounded, weight) and torch.allclose(rounded, weight, atol=0.05)
    assert weight.grad is not None and torch.equal(weight.grad, torch.full_like(weight, 2.0))
