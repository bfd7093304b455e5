"""Adapters that are made of values of the base which their file does not hold: svdiff, and a toy in one line."""

from __future__ import annotations

import logging
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.errors import MergeError

WRITERS: dict[str, Any] = {
    "data": lambda weight: weight.data.mul_(1.5),
    "numpy": lambda weight: weight.detach().numpy().__imul__(1.5),
    "no_grad": lambda weight: torch.no_grad()(weight.mul_)(1.5),
}


def host() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))


def applied(model: nn.Module, method: str, **options: Any) -> peftcore.Injection:
    injection = peftcore.apply(model, method, target=["0", "2"], **options)
    for parameter in injection.parameters():
        nn.init.normal_(parameter, std=0.1)
    return injection


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 8)


@pytest.fixture
def shifts(tmp_path: Path, x: Tensor) -> tuple[Path, Tensor]:
    """A saved adapter of the bare base, and its output."""
    injection = applied(host(), "svdiff")
    injection.save(tmp_path / "shifts")
    return tmp_path / "shifts", injection.model(x).detach()


@pytest.mark.parametrize("other", ["lora", "dora", "oft", "svdiff", "ia3", "bitfit"])
@pytest.mark.parametrize("how", ["apply", "load"])
def test_neither_applied_nor_loaded_where_another_is_merged(
    other: str, how: str, shifts: tuple[Path, Tensor], x: Tensor
) -> None:
    file, expected = shifts
    model = host()
    first = applied(model, other, name="first")
    first.merge()
    merged, keys = model(x), list(model.state_dict())

    def come() -> peftcore.Injection:
        return peftcore.load(model, file, name="second") if how == "load" else applied(model, "svdiff", name="second")

    if other == "bitfit":  # acts on other tensors
        come()
        return
    with pytest.raises(MergeError, match=r"'first' is merged into 0.weight: unmerge\(\) it first"):
        come()
    assert list(peftcore.injections(model)) == ["first"] and list(model.state_dict()) == keys
    assert torch.equal(model(x), merged)
    first.unmerge()
    come()
    with peftcore.activate(model, "second"):
        if how == "load":
            torch.testing.assert_close(model(x), expected)
    first.bake() if how == "apply" else first.merge()


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("around", [nn.Sequential, nn.Identity])
def test_a_state_dict_brings_the_base_that_it_is_made_of(
    assign: bool, around: Any, shifts: tuple[Path, Tensor], x: Tensor
) -> None:
    """Whatever acts before it, and whatever model stands around."""
    file, expected = shifts
    model = host()
    with torch.no_grad():
        nn.init.normal_(model[0].weight)
    applied(model, "lora", name="before", rank=2)
    peftcore.load(model, file, name="shifts")
    right = host()
    applied(right, "lora", name="before", rank=2)
    peftcore.load(right, file, name="shifts")
    whole, other = (nn.Sequential(each) if around is nn.Sequential else each for each in (model, right))
    whole.load_state_dict(deepcopy(other.state_dict()), assign=assign)
    model(x)  # both act
    with peftcore.activate(model, "shifts"):
        torch.testing.assert_close(model(x), expected)


def test_a_state_dict_that_is_loaded_where_another_is_merged_leaves_it_as_it_was(x: Tensor) -> None:
    model = host()
    injection = applied(model, "svdiff")
    applied(model, "lora", rank=2, name="later")
    peftcore.activate(model, "svdiff", "later")
    injection.merge()
    peftcore.injections(model)["later"].merge()
    expected = model(x)
    directions = injection.operators["0"].get_tensor("U").clone()
    model.load_state_dict(model.state_dict())
    assert torch.equal(injection.operators["0"].get_tensor("U"), directions)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("writer", WRITERS)
def test_saving_warns_of_a_base_that_has_changed(writer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    injection = applied(host(), "svdiff")
    with caplog.at_level(logging.WARNING, "peftcore"):
        injection.save(tmp_path / "same")
        assert not caplog.records
        WRITERS[writer](injection.model[0].weight)
        injection.save(tmp_path / "changed")
    assert "1 of them have changed since (0.weight first)" in caplog.text


def test_baking_another_changes_the_base(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = host()
    injection = applied(model, "svdiff")
    other = applied(model, "lora", rank=2)
    peftcore.activate(model, "lora")
    other.merge()
    injection.save(tmp_path / "merged")  # what is merged is no change of the base
    assert not caplog.records
    other.unmerge()
    other.bake()
    injection.save(tmp_path / "baked")
    assert "have changed since" in caplog.text
