"""Names and expressions for modules, as peft's files have them, and never for long."""

import sys
from pathlib import Path

import pytest

from peftcore.errors import CheckpointError
from peftcore.files.formats import patterns
from peftcore.files.formats.patterns import GROUPS, LONGEST, ending, matching, one_file

PATHS = ["layers.0.q_proj", "layers.1.q_proj", "layers.1.xq_proj", "q_proj"]
WHERE = Path("adapter_config.json")


def test_a_name_is_a_whole_path_or_the_end_of_one() -> None:
    assert matching("q_proj", PATHS, WHERE) == {"q_proj"}
    assert matching("q_proj", PATHS, WHERE, endings=True) == {"layers.0.q_proj", "layers.1.q_proj", "q_proj"}
    assert matching("layersX0.q_proj", PATHS, WHERE) == matching("layers.0", PATHS, WHERE) == set()
    assert ending(PATHS, ["1.q_proj", "q_proj"]) == {"layers.0.q_proj", "layers.1.q_proj", "q_proj"}


def test_an_expression_is_for_the_whole_path() -> None:
    assert matching(r"layers\.\d+\.q_proj", PATHS, WHERE) == {"layers.0.q_proj", "layers.1.q_proj"}
    assert matching(r"\d\.x?q_proj", PATHS, WHERE) == set()
    assert matching(r"1\.x?q_proj", PATHS, WHERE, endings=True) == {"layers.1.q_proj", "layers.1.xq_proj"}


@pytest.mark.parametrize(
    ("pattern", "words"),
    [("(", "cannot be matched"), ("a" * LONGEST + "?", "characters"), ("()" * (GROUPS + 1), "groups")],
    ids=["none", "long", "groups"],
)
def test_what_cannot_be_matched_is_refused(pattern: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        matching(pattern, PATHS, WHERE)


def test_all_expressions_of_a_file_share_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.0)
    with one_file(), pytest.raises(CheckpointError):
        matching("q_.*", PATHS, WHERE)
    monkeypatch.setattr(patterns, "SECONDS", 1.0)
    with one_file():
        assert matching("q_.*", PATHS, WHERE) == {"q_proj"}


def test_without_the_package_names_are_read_and_expressions_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "regex", None)
    assert matching("q_proj", PATHS, WHERE) == {"q_proj"}
    with pytest.raises(CheckpointError, match="pip install regex"):
        matching("q_.*", PATHS, WHERE)
