"""The changelog: a screen for each release, with counts that hold, and a fragment for each change in between."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

import peftcore
from peftcore.cli.inspection import methods_table

ROOT = Path(__file__).parents[2]
SCREEN = 45
FRAGMENT = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*\.(added|changed|fixed|removed)\.md")
BESIDE = {"README.md", "template.md.jinja"}
TEXT = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (\S+ - \S+)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))


def well_formed(fragment: Path) -> bool:
    """Whether a file has a slug and a kind, and one entry without a bullet."""
    text = fragment.read_text(encoding="utf-8")
    return bool(FRAGMENT.fullmatch(fragment.name) and text.strip() and not re.match(r"\s|[-*#]|$", text))


def test_fragments_are_well_formed() -> None:
    fragments = [path for path in (ROOT / "changelog.d").iterdir() if path.name not in BESIDE]
    assert [path.name for path in fragments if not well_formed(path)] == []


@pytest.mark.parametrize(
    ("name", "text", "well"),
    [
        ("dora-on-embeddings.fixed.md", "`dora` works.\n", True),
        ("dora.repaired.md", "`dora` works.\n", False),
        ("Dora.fixed.md", "`dora` works.\n", False),
        ("fixed.md", "`dora` works.\n", False),
        ("dora.fixed.txt", "`dora` works.\n", False),
        ("dora.fixed.md", "- `dora` works.\n", False),
        ("dora.fixed.md", "\n", False),
    ],
)
def test_what_is_no_fragment_is_seen(tmp_path: Path, name: str, text: str, well: bool) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert well_formed(tmp_path / name) == well


def test_versions_go_down_and_the_newest_one_is_that_of_the_packages() -> None:
    versions = [Version(heading.split()[0]) for heading in SECTIONS]
    assert versions == sorted(versions, reverse=True)
    assert str(versions[0]) == peftcore.__version__


def test_the_first_release_fits_on_a_screen() -> None:
    (section,) = (text for heading, text in SECTIONS.items() if heading.startswith("0.1.0 "))
    assert len(section.strip().splitlines()) <= SCREEN


@pytest.mark.skipif("0.1.0 - unreleased" not in SECTIONS, reason="the counts of a release are those of its day")
def test_methods_are_counted_as_the_command_line_counts_them() -> None:
    told = re.findall(r"\d+", methods_table.tally(methods_table.records(peftcore.methods(), False)))
    section = SECTIONS["0.1.0 - unreleased"]
    methods, trains, combines, quantized, *_, checked = told
    assert f"{methods} in {len({info.plugin for info in peftcore.methods()} & plugins())} plugins:" in section
    assert f"{trains} train parameters of their own, {combines} combine trained adapters, {quantized} are" in section
    assert f"; {checked} are checked against" in section


def plugins() -> set[str]:
    return {path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml")}


def test_fragments_become_a_section_above_the_others(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    folder = tmp_path / "changelog.d"
    folder.mkdir()
    for name in BESIDE:
        shutil.copy(ROOT / "changelog.d" / name, folder)
    (folder / "dora.fixed.md").write_text("`dora` works.\n", encoding="utf-8")
    (folder / "a-door.added.md").write_text("A door,\nof wood.\n", encoding="utf-8")
    command = ["-m", "towncrier", "build", "--yes", "--version", "9.9.0", "--date", "2030-01-02", "--dir", tmp_path]
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    section = "## 9.9.0 - 2030-01-02\n\n### Added\n- A door,\n  of wood.\n\n### Fixed\n- `dora` works.\n\n"
    at = TEXT.index("## 0.1.0 - ")
    assert (tmp_path / "CHANGELOG.md").read_text(encoding="utf-8") == TEXT[:at] + section + TEXT[at:]
    assert {path.name for path in folder.iterdir()} == BESIDE
