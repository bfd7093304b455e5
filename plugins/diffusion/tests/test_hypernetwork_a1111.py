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
from peftcore.testing import against, conformance, frozen
from peftcore.testing.hosts import HOSTS
from peftcore_diffusion._context_network import ACTIVATIONS, ContextNetwork

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


@pytest.mark.parametrize(
    ("start", "deviation"), [("normal", 0.01), ("xavier_normal", (2 / 600) ** 0.5), ("kaiming_uniform", 0.1)]
)
def test_how_matrices_start(start: str, deviation: float) -> None:
    network = ContextNetwork([200, 400, 200], "relu", False, False, 0.0, start)
    first, last = (stage.linear for stage in network.stages)
    assert first.weight.std().item() == pytest.approx(deviation, rel=0.02)
    assert not first.bias.any()
    assert not last.bias.any()


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
        ({"structure": [1, 2]}, "begins and ends with 1"),
        ({"structure": [1, 0.01, 1]}, "leaves nothing"),
        ({"overrides": {"*": {"scale": 0.5}}}, "no overrides"),
    ]
    for options, why in wrong:
        with pytest.raises(ConfigError, match=why):
            peftcore.plan(model, "hypernetwork_a1111", **options)
    for target in ("attn.q", "mlp.up"):
        with pytest.raises(UnsupportedSite, match="keys or values alone"):
            peftcore.plan(model, "hypernetwork_a1111", target=target)
    with pytest.raises(UnsupportedSite, match="keys or values alone"):
        peftcore.plan(HOSTS["gpt2"].build()[0], "hypernetwork_a1111")


def test_all_activations_are_there() -> None:
    model, inputs = HOSTS["llama"].build()
    found = set()
    for activation in ACTIVATIONS:
        injection = peftcore.apply(model, "hypernetwork_a1111", activation=activation, start="xavier_normal")
        with torch.no_grad():
            found.add(model(**inputs).logits.sum().item())
        injection.remove()
    assert len(found) == len(ACTIVATIONS)
