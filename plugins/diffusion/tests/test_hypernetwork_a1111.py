"""Hypernetworks beside the webui's own code, in the attentions of a UNet."""

from collections.abc import Callable
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import peftcore
from peftcore.errors import ConfigError, UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.hosts import HOSTS
from peftcore_diffusion.hypernetwork_a1111 import OF_WEBUI

NUMBERS = Path(__file__).parent / "numbers" / "hypernetwork_a1111.json"
MADE = SimpleNamespace(**run_path(str(NUMBERS.with_suffix(".py"))))
WEBUI = {
    "repository": "AUTOMATIC1111/stable-diffusion-webui",
    "commit": "3157fe2",
    "script": "modules/hypernetworks/hypernetwork.py",
}


@conformance("hypernetwork_a1111")
def test_conformance(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("case", ["linear", "deep"])
@against("authors", "hypernetwork_a1111", **WEBUI)
def test_outputs_and_gradients_are_those_of_the_webui(case: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs, unets = frozen(NUMBERS)[case], MADE.UNETS
    model = diffusers.UNet2DConditionModel(**unets.UNET).double().requires_grad_(False)
    unets.filled(list(model.parameters()), 0.0, unets.DEVIATION)
    model.train(MADE.CASES[case]["scale"] == 1)
    injection = peftcore.apply(model, "hypernetwork_a1111", dtype="float64", **MADE.CASES[case])
    shared = [injection.shared[f"{part}{size}"] for size in MADE.SIZES for part in "kv"]
    parameters = [each for network in shared for each in network.parameters()]
    assert len(parameters) == len(list(injection.parameters()))
    unets.filled(parameters, 1000.0)
    inputs = unets.given()
    sample, text = (inputs[name].requires_grad_() for name in ("sample", "encoder_hidden_states"))
    output = model(**inputs).sample
    (output * unets.wave(*output.shape, phase=6.0)).sum().backward()
    traces = unets.traces([text.grad, *(each.grad for each in parameters)])
    assert unets.near(output.detach(), theirs["output"])
    assert unets.near(sample.grad, theirs["sample"])
    assert unets.near(torch.tensor(traces, dtype=torch.float64), theirs["traces"])
    with injection.disabled(), torch.no_grad():
        assert (output - model(**inputs).sample).abs().max() > 1e-2


def unet() -> Any:
    return pytest.importorskip("diffusers").UNet2DConditionModel(**MADE.UNETS.UNET)


@pytest.mark.parametrize("start", MADE.STARTS)
@against("authors", "hypernetwork_a1111", **WEBUI, part="start")
def test_start_is_that_of_the_webui(start: str) -> None:
    """Of layers and of the norm between them, however matrices start; the last norm has too few numbers to tell."""
    target = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"
    injection = peftcore.apply(unet(), "hypernetwork_a1111", target=target, start=start, **MADE.START)
    (network,) = injection.shared.values()
    for value, told in zip([*network.parameters()][:6], frozen(NUMBERS, "start")[start], strict=True):
        same_start(value, told)


@against("authors", "hypernetwork_a1111", **WEBUI, part="trains")
def test_what_trains_is_what_the_webui_trains() -> None:
    injection = peftcore.apply(unet(), "hypernetwork_a1111")
    told = frozen(NUMBERS, "trains")
    sizes = {
        width: [each.numel() for part in "kv" for each in injection.shared[f"{part}{width}"].parameters()]
        for width in told
    }
    assert sizes == told
    assert sum(each.numel() for each in injection.parameters()) == sum(map(sum, told.values()))


@against("authors", "hypernetwork_a1111", **WEBUI, part="defaults")
def test_defaults_are_those_of_the_webui() -> None:
    same_defaults(peftcore.apply(unet(), "hypernetwork_a1111").config, frozen(NUMBERS, "defaults"))


def test_dropout_in_training_alone() -> None:
    model, inputs = HOSTS["llama"].build()
    peftcore.apply(model, "hypernetwork_a1111", dropout=0.5, start="kaiming_normal")
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, model(**inputs).logits)
        model.train()
        assert not torch.equal(model(**inputs).logits, model(**inputs).logits)


def test_one_pair_of_networks_for_each_width() -> None:
    model, _ = HOSTS["unet"].build()
    injection = peftcore.apply(model, "hypernetwork_a1111", structure=[1, 1.5, 1])
    assert set(injection.shared) == {f"{part}{width}" for part in "kv" for width in (8, 14, 16)}
    sizes = ((8, 12), (14, 21), (16, 24))
    assert sum(each.numel() for each in injection.parameters()) == 2 * sum(2 * a * b + a + b for a, b in sizes)


def test_what_it_needs() -> None:
    model, _ = HOSTS["llama"].build()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"structure": [1, 2]}, "must begin and end with 1"),
        ({"structure": [1, 0.01, 1]}, "leaves nothing"),
        ({"overrides": {"*": {"scale": 0.5}}}, "no overrides"),
    ]
    for options, why in wrong:
        with pytest.raises(ConfigError, match=why):
            peftcore.plan(model, "hypernetwork_a1111", **options)
    for target in ("attn.q", "mlp.up"):
        with pytest.raises(UnsupportedSite, match="only keys or only values"):
            peftcore.plan(model, "hypernetwork_a1111", target=target)
    with pytest.raises(UnsupportedSite, match="only keys or only values"):
        peftcore.plan(HOSTS["gpt2"].build()[0], "hypernetwork_a1111")


def test_all_activations_are_there() -> None:
    model, inputs = HOSTS["llama"].build()
    found = set()
    for activation in OF_WEBUI:
        injection = peftcore.apply(model, "hypernetwork_a1111", activation=activation, start="xavier_normal")
        with torch.no_grad():
            found.add(model(**inputs).logits.sum().item())
        injection.remove()
    assert len(found) == len(OF_WEBUI)
