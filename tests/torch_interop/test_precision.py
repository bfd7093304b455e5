"""Operators are float32 unless asked otherwise, compute in the dtype of their input, and are cast once."""

from typing import Any

import pytest
import torch
from interop_hosts import METHODS, adapt, encoder, inputs
from torch import Tensor, nn

import peftcore

TOLERANCE = 0.06
"""Largest difference of a bfloat16 forward from its float32 twin, relative to the largest output."""


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_host_with_float32_operators(method: str) -> None:
    reference = encoder()
    adapt(reference, method)
    model = encoder().bfloat16()
    injection = adapt(model, method)
    x = inputs()
    output = model(x.bfloat16())
    assert output.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in injection.parameters()} == {torch.float32}
    assert {parameter.dtype for name, parameter in model.named_parameters() if "peft" not in name} == {torch.bfloat16}
    assert relative(output, reference(x)) < TOLERANCE
    output.float().square().sum().backward()
    for parameter in injection.parameters():
        assert (
            parameter.grad is not None
            and parameter.grad.dtype == torch.float32
            and torch.isfinite(parameter.grad).all()
        )


@pytest.mark.parametrize("method", METHODS)
def test_operators_in_the_hosts_own_dtype(method: str) -> None:
    model = encoder().bfloat16()
    injection = adapt(model, method, dtype="bfloat16")
    assert {parameter.dtype for parameter in injection.parameters()} == {torch.bfloat16}
    output = model(inputs().bfloat16())
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    assert all(parameter.grad is not None for parameter in injection.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_float64_host(method: str) -> None:
    reference, model = encoder(), encoder().double()
    adapt(reference, method)
    injection = adapt(model, method)
    assert {parameter.dtype for parameter in injection.parameters()} == {torch.float32}
    output = model(inputs().double())
    assert output.dtype == torch.float64
    assert relative(output, reference(inputs())) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_autocast_equals_float32_within_bfloat16(method: str) -> None:
    model, x = encoder(), inputs()
    injection = adapt(model, method)
    expected = model(x)
    with peftcore.activate(model):
        base = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
        output.float().square().sum().backward()
    assert output.dtype == torch.bfloat16
    assert relative(output, expected) < TOLERANCE
    assert relative(output, expected) < relative(base, expected) or relative(base, expected) < TOLERANCE
    for parameter in injection.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32


def test_effective_weights_are_computed_at_full_precision_under_autocast() -> None:
    """DoRA's norm in bfloat16 would move a fresh adapter away from identity by percents of a step."""
    model = nn.ModuleDict({"inner": nn.Linear(64, 64, bias=False)})
    injection = adapt(model, "dora", target="inner")
    x, exact = torch.randn(2, 64), injection.operators["inner"](model["inner"].weight)
    fresh = nn.Linear(64, 64, bias=False)
    peftcore.apply(fresh, "dora", target="")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fresh(x), nn.functional.linear(x, fresh.weight))
    seen: list[Tensor] = []
    injection.operators["inner"].register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), peftcore.cache_weights(model):
        output = model.eval()["inner"](x)
    assert output.dtype == torch.bfloat16
    assert seen and all(torch.equal(weight, exact) for weight in seen)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "bitfit"])
def test_merge_in_bfloat16_is_rounded_once(method: str) -> None:
    """The merged weight is the float32 result cast once, not the sum of rounded parts."""
    model, reference = encoder().bfloat16(), encoder().bfloat16().float()
    injection, exact = adapt(model, method), adapt(reference, method)
    injection.merge()
    exact.merge()
    for (name, actual), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        if "peft" not in name:
            assert torch.equal(actual, expected.bfloat16()), name


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "bitfit"])
def test_merging_under_autocast_rounds_nothing(method: str) -> None:
    model = encoder()
    injection = adapt(model, method)
    injection.merge()
    merged = {name: value.clone() for name, value in model.named_parameters()}
    injection.unmerge()
    with torch.autocast("cpu", torch.bfloat16):
        injection.merge()
    assert all(torch.equal(value, merged[name]) for name, value in model.named_parameters())


@pytest.mark.parametrize("method", METHODS)
def test_host_cast_after_apply_takes_its_operators_along(method: str) -> None:
    model = encoder()
    injection = adapt(model, method)
    model.double()
    assert {parameter.dtype for parameter in injection.parameters()} == {torch.float64}
    assert model(inputs().double()).dtype == torch.float64
    injection.remove()


def test_fresh_identity_holds_in_bfloat16() -> None:
    x = inputs().bfloat16()
    base = encoder().bfloat16()(x)
    options: dict[str, dict[str, Any]] = {"houlsby_adapter": {"up_init_std": 0.0}}
    for method in METHODS:
        model = encoder().bfloat16()
        peftcore.apply(model, method, **options.get(method, {}))
        assert relative(model(x), base) < 0.02, method


def test_evaluation_without_gradients_and_training_agree_in_bfloat16() -> None:
    for method in METHODS:
        model = encoder().bfloat16()
        adapt(model, method)
        x = inputs().bfloat16()
        expected = model(x)
        with torch.no_grad():
            assert torch.equal(model(x), expected), method
        with torch.inference_mode():
            assert torch.equal(model(x), expected), method
