"""Proven and experimental: what a tag may say, that tests bear it out, and what `apply` tells of it."""

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from core_toys import Doubling
from torch import nn

import peftcore
from peftcore.errors import PluginError, TargetError
from peftcore.registry import experimental as notices

ROOT = Path(__file__).parents[2]
INFOS = [info for info in peftcore.methods() if info.plugin in {path.name for path in ROOT.glob("plugins/*")}]
SHARED = [*ROOT.glob("plugins/*/tests/interop/test_*.py"), *ROOT.glob("tests/side_by_side/*.py")]
SHARED += [ROOT / "tests/interop/test_adapterhub.py", ROOT / "tests/interop/test_peft_lora.py"]
FOREIGN = re.compile(r"^\s*(?:import|from) (?:peft|lycoris|galore_torch|adapters)\b|^AUTHORS", re.MULTILINE)


# ---------------------------------------------------------------- tags

MEMBERS = {name: value for name, value in vars(Doubling).items() if not name.startswith("_")}


@pytest.mark.parametrize(
    "sources",
    ["", "peft 0.21", "the authors' code", "peft 0.21, bitsandbytes 0.50, the authors' code", "galore_torch 1"],
)
def test_sources_have_versions(sources: str) -> None:
    tags = replace(Doubling.tags, checked_against=sources)
    assert peftcore.register(type("Other", (peftcore.Method,), {**MEMBERS, "tags": tags})).tags.proven is bool(sources)


@pytest.mark.parametrize("sources", ["the equation in float64", "float64", "peft", "peft 0.21,", ", peft 0.21", "yes"])
def test_nothing_else_is_a_source(sources: str) -> None:
    tags = replace(Doubling.tags, checked_against=sources)
    with pytest.raises(PluginError, match="whose numbers"):
        peftcore.register(type("Other", (peftcore.Method,), {**MEMBERS, "tags": tags}))


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_tags_are_what_tests_compare_with(info: peftcore.MethodInfo) -> None:
    """Each source is named in the method's own test, or beside the method's name in one of those for many methods. And
    a test that imports another library, or has the authors' numbers, is not kept quiet about."""
    own = (ROOT / f"plugins/{info.plugin}/tests/test_{info.name}.py").read_text(encoding="utf-8")
    texts = [own, *(text for path in SHARED if f'"{info.name}"' in (text := path.read_text(encoding="utf-8")))]
    for source in filter(None, info.checked_against.split(", ")):
        name = "authors" if source.startswith("the ") else source.split()[0].lower()
        assert any(re.search(rf"\b{name}\b(?!_)", text.lower()) for text in texts), source
    assert info.proven or not FOREIGN.search(own), "its test compares with others' numbers, and its tag does not say so"
    assert info.proven is bool(info.checked_against)


# ---------------------------------------------------------------- the notice


@pytest.fixture
def nobody_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "told", set())
    peftcore.register(Doubling)


def host() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def lines(caplog: Any) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "peftcore"]


@pytest.mark.usefixtures("nobody_told")
def test_experimental_methods_are_told_once_by_name(caplog: pytest.LogCaptureFixture) -> None:
    model = host()
    peftcore.plan(model, Doubling.name, target=["0", "1"])
    with pytest.raises(TargetError):
        peftcore.apply(model, Doubling.name, target="nowhere")
    assert not lines(caplog)
    for number in range(3):
        peftcore.apply(model, Doubling.name, target=["0", "1"], name=f"number{number}")
    [line] = lines(caplog)
    assert repr(Doubling.name) in line and "equation alone" in line and "getLogger('peftcore')" in line
    assert caplog.records[0].levelno == logging.WARNING


@pytest.mark.usefixtures("nobody_told")
def test_parts_are_told_too_and_proven_methods_are_not(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
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
