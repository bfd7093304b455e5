"""Codes that bitsandbytes packs once more in evaluation, on CPUs with AVX512-BF16: never while a host is adapted.

Every machine takes part: the flag by which a module says that its CPU can is set by hand, and what would pack is
watched. Where no kernel could compute with what it makes, it is called in place of an evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.forward.state.slot import slot_of
from peftcore.registry.plugins import layer_of

bnb = pytest.importorskip("bitsandbytes")
modules = pytest.importorskip("bitsandbytes.nn.modules")
X = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1))


class Packing(Exception):
    """Codes would have been packed once more."""


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """What packs codes raises instead."""

    def packs(*_: Any) -> Any:
        raise Packing

    monkeypatch.setattr(modules, "_convert_weight_packed_for_cpu", packs)


@pytest.fixture(params=[False, True], ids=["plain", "double"])
def loaded(request: pytest.FixtureRequest) -> Iterator[nn.Sequential]:
    """A host as others load it, on a CPU that has AVX512-BF16."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for outputs, inputs in ((96, 64), (64, 96 * 2)):
        layer = bnb.nn.Linear4bit(inputs, outputs, quant_type="nf4", compress_statistics=request.param)
        weight = torch.randn(outputs, inputs) / 8
        layer.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=request.param, module=layer
        )
        layer.support_avx512bf16_for_cpu = True
        layers.append(layer)
    yield nn.Sequential(layers[0], Twice(), layers[1]).to("cpu").eval()


class Twice(nn.Module):
    """[..., n] -> [..., 2 n]"""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.tanh(x), x], -1)


def weights(host: nn.Sequential) -> list[Tensor]:
    read = [layer_of(layer, "weight").read(layer, "weight") for layer in (host[0], host[2])]
    return [weight.clone() for weight in read if weight is not None]


def evaluated(host: nn.Sequential) -> None:
    """The host after an evaluation on such a CPU."""
    if bnb.functional.has_avx512bf16():
        with torch.no_grad():
            host.eval()(X)
    else:
        for layer in (host[0], host[2]):
            pack = modules._convert_weight_packed_for_cpu
            layer.weight.data, layer.weight.quant_state = pack(layer.weight.data, layer.weight.quant_state)
    assert all(layer.weight.quant_state.packing_format_for_cpu for layer in (host[0], host[2]))


def lora(host: nn.Module) -> Any:
    injection = peftcore.apply(host, "lora", rank=4, target=["0", "2"], seed=0)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    return injection


def gradients(host: nn.Module, injection: Any) -> list[Tensor]:
    host.zero_grad()
    host.train()(X).square().mean().backward()
    host.eval()
    return [parameter.grad.clone() for parameter in injection.parameters()]


def dense(host: nn.Sequential) -> nn.Sequential:
    """The host with the weights that are read of it."""
    twin = nn.Sequential(nn.Linear(64, 96), Twice(), nn.Linear(192, 64))
    for path, weight in zip((0, 2), weights(host), strict=True):
        twin[path].weight, twin[path].bias = nn.Parameter(weight), nn.Parameter(host[path].bias.detach().clone())
    return twin


@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="this CPU has no such kernel")
def test_the_trap_is_there(loaded: nn.Sequential) -> None:
    for layer in (loaded[0], loaded[2]):
        layer.bias = None  # with one, it would be an error
    evaluated(loaded)
    x = X.clone().requires_grad_()
    loaded.train()(x).sum().backward()
    assert x.grad is None or not x.grad.any()


def test_reading_a_host_that_was_evaluated_changes_nothing(loaded: nn.Sequential) -> None:
    before = weights(loaded)
    evaluated(loaded)
    codes = [layer.weight.data for layer in (loaded[0], loaded[2])]
    for _ in range(2):
        for after, weight in zip(weights(loaded), before, strict=True):
            assert (after - weight).norm() < 0.005 * weight.norm()  # bitsandbytes rounds the scales, for good
    assert all(torch.equal(layer.weight.data, own) for layer, own in zip(loaded[::2], codes, strict=True))
    assert all(layer.weight.quant_state.packing_format_for_cpu for layer in (loaded[0], loaded[2]))


@pytest.mark.parametrize("before", [False, True], ids=["new", "evaluated"])
def test_gradients_are_those_of_the_dense_weights(loaded: nn.Sequential, before: bool) -> None:
    read = weights(loaded)
    if before:
        evaluated(loaded)
    injection, twin = lora(loaded), dense(loaded)
    for now, then in zip(weights(loaded), read, strict=True):
        assert (now - then).norm() <= (0.005 if before else 0) * then.norm()
    for ours, theirs in zip(gradients(loaded, injection), gradients(twin, lora(twin)), strict=True):
        assert ours.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("before", [False, True], ids=["new", "evaluated"])
@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "disabled", "frozen"])
def test_an_evaluation_of_an_adapted_host_packs_nothing(
    loaded: nn.Sequential, request: pytest.FixtureRequest, how: str, before: bool
) -> None:
    if before:
        evaluated(loaded)
    injection = lora(loaded)
    expected = gradients(loaded, injection)
    request.getfixturevalue("watched")
    contexts: dict[str, Callable[[], Any]] = {
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "disabled": injection.disabled,
        "frozen": torch.enable_grad,
    }
    if how == "frozen":
        injection.trainable(False)
    with contexts[how]():
        loaded.eval()(X)
    injection.trainable()
    assert not any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in loaded[::2])
    for now, then in zip(gradients(loaded, injection), expected, strict=True):
        assert torch.equal(now, then) and now.abs().max() > 0


def test_after_removal_the_host_does_as_it_did(loaded: nn.Sequential, watched: None) -> None:
    before = [sorted(vars(layer)) for layer in loaded]
    injection = lora(loaded)
    with torch.no_grad():
        loaded.eval()(X)
    injection.remove()
    assert [sorted(vars(layer)) for layer in loaded] == before
    assert all(layer.support_avx512bf16_for_cpu is True for layer in loaded[::2])
    with torch.no_grad(), pytest.raises(Packing):
        loaded.eval()(X)


@pytest.mark.parametrize("into", ["float", "same"])
def test_a_host_that_was_evaluated_merges_right(loaded: nn.Sequential, into: Any) -> None:
    evaluated(loaded)
    injection = lora(loaded)
    with torch.no_grad():
        adapted = loaded(X)
    report = injection.merge(into=into)
    with torch.no_grad():
        merged = loaded.train()(X)
    error = float((merged - adapted).norm() / adapted.norm())
    assert error < (1e-5 if into == "float" else 0.15), report
    injection.unmerge()
    with torch.no_grad():
        assert torch.equal(loaded(X), adapted)


@pytest.mark.parametrize(
    "shape",
    [(96, 64), (40, 64), pytest.param((7, 5), marks=pytest.mark.slow)],  # bitsandbytes compiles for what does not fit
)
def test_what_is_packed_here_is_never_packed_again(shape: tuple[int, int], watched: None) -> None:
    host = peftcore.quantize(nn.Sequential(nn.Linear(shape[1], shape[0])).eval(), "bnb-nf4")
    weight = layer_of(host[0], "weight").read(host[0], "weight")
    with torch.no_grad():
        output = host(torch.ones(2, 3, shape[1]))
    assert weight is not None
    torch.testing.assert_close(output[0, 0], weight.sum(1) + host[0].bias)


def test_what_cannot_be_packed_again_is_not_held() -> None:
    """A view at each call is a third of what LoRA costs a token."""
    for able in (False, True):
        model = nn.Sequential(nn.Linear(64, 64)).eval()
        peftcore.quantize(model, "bnb-nf4")
        model[0].support_avx512bf16_for_cpu = able
        peftcore.apply(model, "lora", target="0")
        slot = slot_of(model[0])
        assert slot is not None and bool(slot.forced_attributes) is able
