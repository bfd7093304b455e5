"""What the chooser says of methods is what their tags, plans and the recorded results say."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

import chooser
from peftcore.testing.kit import ALL

ROOT = Path(__file__).parents[2]
DEAR = {"memory"}
"""Sections that take many seconds: written anew in a whole run."""
SLOW = {"sizes"}
"""Those that take some: a test by themselves."""


def test_methods_have_what_the_advice_claims() -> None:
    assert chooser.broken() == []


def test_a_claim_that_does_not_hold_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(chooser.ADVICE[0], methods=("prefix_tuning",), claims=("merge", "low rank"))
    monkeypatch.setattr(chooser, "ADVICE", (wrong,))
    assert chooser.broken() == ["prefix_tuning does not merge", "prefix_tuning does not low rank"]


@pytest.mark.parametrize("page", ("docs/choose.md", "docs/moving-from-peft.md"))
def test_sections_are_what_the_script_writes(page: str) -> None:
    """Written anew with ``python docs/generate/chooser.py``."""
    text = (ROOT / page).read_text(encoding="utf-8")
    assert chooser.filled(text, set(chooser.SECTIONS) - DEAR - SLOW) == text


@pytest.mark.slow
def test_dear_sections_are_what_the_script_writes() -> None:
    text = (ROOT / "docs/choose.md").read_text(encoding="utf-8")
    assert chooser.filled(text, SLOW | (DEAR if os.environ.get(ALL) == "1" else set())) == text
