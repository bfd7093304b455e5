"""`make docs` without what is planned and drawn for each method: every link, anchor and reference holds."""

from pathlib import Path

import pytest

import facts

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_site_builds_and_nothing_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.setenv("DISABLE_MKDOCS_2_WARNING", "true")
    monkeypatch.setattr(facts.Facts, "budgets", {"BERT base": 1000})
    monkeypatch.setattr(facts.Facts, "drawing", "<svg></svg>")
    found = {"snippet": "import peftcore\n", "host": "a host", "way": facts.UPDATES, "parts": []}
    monkeypatch.setattr(facts.Facts, "_found", found)
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))  # raises when it warns
    text = (tmp_path / "methods/lora.html").read_text(encoding="utf-8")
    assert "<math" in text
    for page in tmp_path.rglob("*.html"):
        assert '<script src="http' not in page.read_text(encoding="utf-8"), f"{page.name} asks a network for a script"
