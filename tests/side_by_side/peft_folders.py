"""Folders of peft in both directions: what it saves is loaded here, what is saved here is loaded there, and the outputs
are the same."""

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import torch
from peft_pairs import FILL, MOVED, OUTPUTS, difference
from torch import Tensor, nn

import peftcore
from peftcore.injection.injection import Injection

Run = Callable[[nn.Module], Tensor]
Change = Callable[[nn.Module], None]


@torch.no_grad()
def fill(parameters: Any) -> None:
    """Noise, which is added: gains of one stay near one, and a pair that cancelled does so no more."""
    for parameter in parameters:
        parameter.add_(torch.randn_like(parameter) * FILL)


def assert_same(base: Tensor, ours: Tensor, theirs: Tensor) -> None:
    """Equal to each other, and far from the base."""
    assert difference(theirs, base) >= MOVED, "the adapters hardly moved the output"
    assert difference(ours, theirs) <= OUTPUTS


def saved_by_peft(base: nn.Module, config: peft.PeftConfig, path: Path, change: Change | None = None) -> nn.Module:
    """Peft's model with noise in all that it trains, saved to a folder."""
    theirs = peft.get_peft_model(deepcopy(base), config).eval()
    fill(parameter for parameter in theirs.parameters() if parameter.requires_grad)
    if change is not None:
        change(theirs)
    theirs.save_pretrained(str(path))
    return theirs


def assert_reads(
    base: nn.Module, config: peft.PeftConfig, run: Run, path: Path, change: Change | None = None
) -> Injection:
    """Made by peft, loaded here; saved natively and loaded again it is the same to the bit."""
    base = base.eval()
    theirs = saved_by_peft(base, config, path / "theirs", change)
    ours = deepcopy(base)
    injection = peftcore.load(ours, path / "theirs")
    with torch.no_grad():
        output = run(ours)
        assert_same(run(base), output, run(theirs))
        injection.save(path / "native")
        again = deepcopy(base)
        peftcore.load(again, path / "native")
        assert torch.equal(run(again), output)
    return injection


def assert_writes(
    base: nn.Module, method: str, options: Mapping[str, Any], run: Run, path: Path, change: Change | None = None
) -> dict[str, Any]:
    """Made here, loaded by peft. Returns the options that were written."""
    base = base.eval()
    ours = deepcopy(base)
    injection = peftcore.apply(ours, method, **options)
    fill(injection.parameters())
    injection.save(path / "ours", format="peft")
    theirs = peft.PeftModel.from_pretrained(deepcopy(base), str(path / "ours")).eval()
    if change is not None:
        change(theirs)
    with torch.no_grad():
        assert_same(run(base), run(ours), run(theirs))
    written: dict[str, Any] = json.loads((path / "ours" / "adapter_config.json").read_text())
    return written
