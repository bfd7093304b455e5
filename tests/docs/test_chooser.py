"""What the chooser says of methods is what their tags, plans and the recorded results say."""

import importlib.util
import os
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from peftcore.testing.kit import ALL

ROOT = Path(__file__).parents[2]
DEAR = {"memory"}
"""Sections that take many seconds: written anew in a whole run."""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("chooser", ROOT / "docs/generate/chooser.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_methods_have_what_the_advice_claims(script: ModuleType) -> None:
    assert script.broken() == []


def test_a_claim_that_does_not_hold_is_seen(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(script.ADVICE[0], methods=("prefix_tuning",), claims=("merge", "low rank"))
    monkeypatch.setattr(script, "ADVICE", (wrong,))
    assert script.broken() == ["prefix_tuning does not merge", "prefix_tuning does not low rank"]


@pytest.mark.parametrize("page", ("docs/choose.md", "docs/moving-from-peft.md"))
def test_sections_are_what_the_script_writes(page: str, script: ModuleType) -> None:
    """Written anew with ``python docs/generate/chooser.py``."""
    text = (ROOT / page).read_text(encoding="utf-8")
    quick = set(script.SECTIONS) - DEAR
    assert script.filled(text, script.SECTIONS if os.environ.get(ALL) == "1" else quick) == text
