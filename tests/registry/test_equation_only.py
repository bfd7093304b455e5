"""What `apply` tells once of a method that was compared with its equation only."""

import logging
from pathlib import Path
from typing import Any

import pytest
from core_toys import Doubling
from torch import nn

import peftcore
from peftcore.errors import TargetError
from peftcore.registry import equation_only as notices


@pytest.fixture
def nobody_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "told", set())
    peftcore.register(Doubling)


def host() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def lines(caplog: Any) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "peftcore"]


@pytest.mark.usefixtures("nobody_told")
def test_they_are_told_once_by_name(caplog: pytest.LogCaptureFixture) -> None:
    model = host()
    peftcore.plan(model, Doubling.name, target=["0", "1"])
    with pytest.raises(TargetError):
        peftcore.apply(model, Doubling.name, target="nowhere")
    assert not lines(caplog)
    for number in range(3):
        peftcore.apply(model, Doubling.name, target=["0", "1"], name=f"number{number}")
    [line] = lines(caplog)
    assert repr(Doubling.name) in line and "equation only" in line and "getLogger('peftcore')" in line
    assert caplog.records[0].levelno == logging.WARNING


@pytest.mark.usefixtures("nobody_told")
def test_parts_are_told_too_and_checked_methods_are_not(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    injection = peftcore.apply(host(), ["lora", Doubling.name], target=["0", "1"])
    assert len(lines(caplog)) == 1 and repr(Doubling.name) in lines(caplog)[0]
    injection.save(tmp_path)
    peftcore.load(host(), tmp_path)
    assert len(lines(caplog)) == 1


@pytest.mark.usefixtures("nobody_told")
def test_the_notice_can_be_silenced_as_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    """Without any handler, a warning would be written to stderr."""
    logger = logging.getLogger("peftcore")
    before = logger.level
    logger.setLevel("ERROR")
    try:
        peftcore.apply(host(), Doubling.name, target=["0", "1"])
    finally:
        logger.setLevel(before)
    assert not any(capsys.readouterr())
