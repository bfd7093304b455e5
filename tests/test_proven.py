"""Proven and experimental: tests bear out what tags say."""

import re
from pathlib import Path

import pytest

import peftcore

ROOT = Path(__file__).parents[1]
INFOS = [info for info in peftcore.methods() if info.plugin in {path.name for path in ROOT.glob("plugins/*")}]
SHARED = [*ROOT.glob("plugins/*/tests/interop/test_*.py"), *ROOT.glob("tests/side_by_side/*.py")]
SHARED += [ROOT / "tests/files/formats/test_adapterhub.py", ROOT / "tests/files/formats/test_peft.py"]
FOREIGN = re.compile(r"^\s*(?:import|from) (?:peft|lycoris|galore_torch|adapters)\b|^AUTHORS", re.MULTILINE)


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
