"""An error inside a base forward: its traceback shows few frames of peftcore between the model and the module's own
code, whatever acts there."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from core_toys import Doubling, Shift
from torch import Tensor, nn

import peftcore
from peftcore import Average, activate, route
from peftcore.testing.kit import fill

CORE = str(Path(peftcore.__file__).parent)
WIDTH = 8
MOST = 6
"""Frames of peftcore in a traceback."""


class InTheBaseForward(Exception):
    """Raised by the base's own product."""


@dataclass(frozen=True)
class Case:
    """What acts at a linear layer, and how."""

    methods: tuple[Any, ...]
    choose: Callable[[nn.Module], object] | None = None
    """Chooses among the adapters "a", "b", ...; None where all are active."""


def rows(*names: str | None) -> Callable[[nn.Module], object]:
    return lambda model: route(model, names)


def averaged(model: nn.Module) -> object:
    return activate(model, Average("a", "b"))


CASES = {
    "plain: adapters are there, and none is active": Case(("lora",), lambda model: activate(model)),
    "weight form: an effective weight": Case((Shift,)),
    "weight form: of two adapters": Case(("ia3", "dora")),
    "weight form: computed again in backward with all that the module does": Case(("hira",)),
    "activation form: of a weight operator": Case(("dora",)),
    "around: an operator that wraps the layer": Case((Doubling,)),
    "around: a low-rank update, which the layer computes": Case(("lora",)),
    "around: one operator around another one": Case((Doubling, "lora", "ia3")),
    "a route: updates of all rows in one product": Case(("lora", "lora"), rows("a", "b", None, "a")),
    "a route: adapters that wrap, over one forward of the base": Case(("lora", "ia3"), rows("a", "b", None, "a")),
    "a route: rows of weight operators by themselves": Case((Shift, "ia3"), rows("a", "b", None, "a")),
    "a route: rows in an activation form": Case(("dora", "oft"), rows("a", "b", None, "a")),
    "a route: equal adapters as one": Case(("ia3", "ia3"), rows("a", "b", "a", "b")),
    "a route: equal adapters as one, that change the input": Case(("hra", "hra"), rows("a", "b", "a", "b")),
    "a composition: branches over one forward of the base": Case(("lora", "ia3"), averaged),
    "a composition: branches with weights of their own": Case((Shift, "dora"), averaged),
}


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_an_error_in_a_base_forward_has_few_frames_of_peftcore_around_it(
    case: Case, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH)).train(training)
    for name, method in zip("abc", case.methods, strict=False):
        fill(peftcore.apply(model, method, name=name, target="0"))
    if case.choose is not None:
        case.choose(model)
    x, product = torch.randn(4, WIDTH), F.linear
    model(x)

    def failing(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.shape[-2:] == (WIDTH, WIDTH):  # the base's, and no operator's
            raise InTheBaseForward
        return product(x, weight, bias)

    monkeypatch.setattr(F, "linear", failing)
    with pytest.raises(InTheBaseForward) as caught, torch.set_grad_enabled(training):
        model(x)
    frames = [frame for frame in traceback.extract_tb(caught.tb) if frame.filename.startswith(CORE)]
    assert 0 < len(frames) <= MOST, [f"{frame.filename.removeprefix(CORE)}: {frame.name}" for frame in frames]
