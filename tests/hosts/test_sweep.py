"""Every method of all plugins on every family of hosts, by role: it acts there and leaves no trace, or says why not."""

import os
import warnings
from typing import Any

import pytest
import torch
from host_zoo import SURVEY, build
from model_outputs import floats
from slowly import quick
from torch import Tensor, nn

import peftcore
from peftcore.errors import CalibrationError, InactiveSite, MissingContext, SequenceError, TargetError, UnsupportedSite
from peftcore.roles import derive, probe
from peftcore.testing.doors import ALL
from peftcore.testing.kit import fill

FAMILIES = (
    "llama",
    "mixtral",
    "gpt2",
    "mamba",
    "bert_cls",
    "t5",
    "whisper",
    "clip",
    "vit",
    "timm_vit",
    "timm_swinv2",
    "timm_resnet18",
    "timm_mixer",
    "sd15_unet",
    "sd3",
    "dit",
    "llava",
)
"""Hosts of every run; all surveyed ones when PEFTCORE_TEST_ALL=1."""
LARGE = ("whisper", "clip", "timm_swinv2", "sd15_unet", "sd3", "llava")
"""Those that take longest; `make test-slow` has them."""
REFUSALS = (TargetError, UnsupportedSite, CalibrationError)
"""The method has nothing to act on in the host, a site of a kind that it does not know, or looked at data that says
nothing there: inputs of a layer that are all zero (DETR's first queries)."""
LATER = (SequenceError, MissingContext, UnsupportedSite)
"""It stands, and forward wants to be told more, or cannot be followed."""
SHORT: dict[str, Any] = {
    "attempt": {"parts": [{"method": "prompt_tuning", "length": 4}] * 2},
    "dept": {"length": 4},
    "maple": {"depth": 2},
}
"""Options of methods whose prompts are longer than small hosts have positions, or go deeper than they have blocks."""
KNOWN = {
    ("llava", "vpt_shallow"): "the projector takes hidden states from between the blocks of the vision tower",
}
"""Failures by host and method, with reasons."""


def run(model: nn.Module, inputs: dict[str, Any], seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(floats(model(**inputs)))


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def enliven(model: nn.Module) -> nn.Module:
    """Fill tensors that start at zero (heads, gates), behind which nothing would show; the same each time."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1, generator=generator)
    return model


def verdict(method: str, model: nn.Module, inputs: dict[str, Any], base: list[Tensor], **known: Any) -> str:
    """How it went: "acts", "refuses", "waits", or what is wrong. Modules whose weights are read instead of being called
    are found by a probe, as the error says."""
    data = [lambda host: sum(each.float().square().mean() for each in floats(host(**inputs)))]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wanted = data if peftcore.method(method).tags.needs_data else None
    try:
        injection = peftcore.apply(model, method, data=wanted, **SHORT.get(method, {}), **known)
    except REFUSALS:
        return "refuses" if equal(run(model, inputs), base) else "refuses, and the host has changed"
    except InactiveSite:  # while it looked at data
        if known:
            raise
        return verdict(method, model, inputs, base, host=probe(model, inputs, derive(model)))
    fill(injection)
    changed: list[Tensor] = []
    try:
        changed = run(model, inputs)
    except LATER:
        pass
    except InactiveSite:
        injection.remove()
        if known:
            raise
        return verdict(method, model, inputs, base, host=probe(model, inputs, derive(model)))
    trains = any(True for _ in injection.parameters())
    words = all((site.role or "").startswith("embed") for site in injection.sites)  # of which none may be in the input
    injection.remove()
    after = model.state_dict()
    if before.keys() != after.keys() or not all(torch.equal(before[key], after[key]) for key in before):
        return "leaves other weights behind"
    if not equal(run(model, inputs), base):
        return "leaves other outputs behind"
    if not all(torch.isfinite(each).all() for each in changed):
        return "gives numbers that are not finite"
    if changed and trains and equal(changed, base):
        return "waits" if words else "acts on nothing that the host computes"
    return "acts" if changed else "waits"


@pytest.mark.share(6)
@pytest.mark.parametrize(
    "name", quick(SURVEY if os.environ.get(ALL) == "1" else FAMILIES, [name for name in FAMILIES if name not in LARGE])
)
def test_every_method_acts_or_refuses_and_leaves_no_trace(name: str) -> None:
    model, inputs = build(name)
    enliven(model)
    base = run(model, inputs)
    assert equal(run(model, inputs), base), "the host itself is not repeatable"
    verdicts = {}
    for info in peftcore.methods():
        if any(field.is_required() for field in peftcore.method(info.name).Config.model_fields.values()):
            continue  # it has to be told what to do
        try:
            verdicts[info.name] = verdict(info.name, model, inputs, base)
        except Exception as error:
            verdicts[info.name] = f"{type(error).__name__}: {str(error)[:200]}"
            model = enliven(build(name)[0])
    wrong = {method: how for method, how in verdicts.items() if how not in ("acts", "refuses", "waits")}
    assert {(name, method) for method in wrong} == {each for each in KNOWN if each[0] == name}, wrong
    assert sum(how == "acts" for how in verdicts.values()) >= 5
