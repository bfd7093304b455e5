"""Nobody looks for garbage while thousands of objects are made that stay; afterwards as before."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
from torch import nn

import peftcore
from peftcore import garbage
from peftcore.errors import TargetError


@pytest.fixture
def looks() -> Iterator[list[int]]:
    """The generations that were looked through, as often as Python does by itself: these tests let it wait."""
    seen: list[int] = []

    def note(phase: str, info: Any) -> None:
        if phase == "start":
            seen.append(info["generation"])

    thresholds = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    gc.callbacks.append(note)
    yield seen
    gc.callbacks.remove(note)
    gc.set_threshold(*thresholds)


def many() -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(2, 2) for _ in range(300))


def test_not_while_sites_are_made(looks: list[int]) -> None:
    model = many()
    gc.collect()
    looks.clear()
    peftcore.apply(model, "lora", target=nn.Linear)
    assert len(looks) <= 6, "at the ends of what is done in one go; without that, nearly forty times"


@pytest.mark.parametrize("looking", [True, False])
def test_python_looks_as_it_did_before(looking: bool) -> None:
    try:
        gc.enable() if looking else gc.disable()
        with garbage.kept():
            assert not gc.isenabled()
            with garbage.kept():
                pass
            assert not gc.isenabled()
        with pytest.raises(TargetError):
            peftcore.apply(many(), "lora", target="nothing")
        assert gc.isenabled() is looking
    finally:
        gc.enable()


def test_data_is_looked_at_with_garbage_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user's model leaves behind in a forward is not kept for as long as there are batches."""
    found: list[bool] = []
    monkeypatch.setattr("peftcore.injection.applying.calibrate", lambda *args: found.append(gc.isenabled()))
    peftcore.apply(many(), "fish_mask", target=nn.Linear, data=[{}])
    assert found == [True]
