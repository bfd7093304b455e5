"""Ten packages have one version, fit each other, and get the next one by one command. (That all can be built and pass
`twine check` is part of what test_wheels.py starts with.)"""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import peftcore

ROOT = Path(__file__).parents[2]
PYPROJECTS = [Path("pyproject.toml"), *(path.relative_to(ROOT) for path in ROOT.glob("plugins/*/pyproject.toml"))]
FILES = [*PYPROJECTS, Path("peftcore/__init__.py"), Path("release/version.py"), Path("CITATION.cff")]


def assert_one_version(root: Path, version: str, below: str) -> None:
    """All say `version`, and want each other from it on and below the other."""
    assert len(PYPROJECTS) == 10
    for path in PYPROJECTS:
        project = tomllib.loads((root / path).read_text(encoding="utf-8"))["project"]
        assert project["version"] == version, path
        wanted = [each for each in map(Requirement, project["dependencies"]) if each.name.startswith("peftcore")]
        assert [each.name for each in wanted][:1] == ["peftcore"] * (path.parent != Path()), path
        for extra in project.get("optional-dependencies", {}).values():
            wanted += [each for each in map(Requirement, extra) if each.name.startswith("peftcore-")]
        for each in wanted:
            assert {str(one) for one in each.specifier} == {f">={version}", f"<{below}"}, path
    assert f"\nversion: {version}\n" in (root / "CITATION.cff").read_text(encoding="utf-8")
    assert f'__version__ = "{version}"' in (root / "peftcore" / "__init__.py").read_text(encoding="utf-8")


def test_all_packages_have_one_version() -> None:
    now = Version(peftcore.__version__)
    assert_one_version(ROOT, str(now), str(now.major + 1) if now.major else f"0.{now.minor + 1}")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What is changed, at version 0.1.0."""
    for path in FILES:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    subprocess.run(
        [sys.executable, "-c", "import version; version.write('0.1.0')"], cwd=tmp_path / "release", check=True
    )
    return tmp_path


def texts(root: Path) -> list[str]:
    return [(root / path).read_text(encoding="utf-8") for path in FILES]


def bump(root: Path, *version: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, root / "release" / "version.py", *version]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("version", "below"), [("0.2.0", "0.3"), ("0.1.1", "0.2"), ("1.4.0rc1", "2")])
def test_one_command_changes_all(copy: Path, version: str, below: str) -> None:
    before = texts(copy)
    assert bump(copy, version).returncode == 0
    assert_one_version(copy, version, below)
    for one, other in zip(before, texts(copy), strict=True):  # and nothing else
        lines = zip(one.splitlines(), other.splitlines(), strict=True)
        changed = [old for old, new in lines if old != new]
        wanted = '(__version__|version|dependencies|[a-z]+) = |version: |    "peftcore'
        assert all(re.match(wanted, line) for line in changed), changed


@pytest.mark.parametrize("version", ["0.1.0", "0.0.9", "next", ""])
def test_a_version_that_is_none_or_not_later_changes_nothing(copy: Path, version: str) -> None:
    before = texts(copy)
    done = bump(copy, version)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert texts(copy) == before


DONE = "# Changelog\n\n## 0.1.0 - 2030-01-02\n"


@pytest.mark.parametrize(
    ("tag", "changelog", "fragment", "said"),
    [
        ("v0.1.0", DONE, None, ""),
        ("v0.1.0", DONE.replace("2030-01-02", "unreleased"), None, 'no heading "## 0.1.0 - YEAR-MONTH-DAY"'),
        ("v0.1.0", DONE, "dora.fixed.md", "not yet in CHANGELOG.md: dora.fixed.md"),
        ("v0.2.0", DONE, None, "make version VERSION=0.2.0"),
        ("0.1.0", DONE, None, "is not v0.1.0"),
    ],
)
def test_a_tag_that_does_not_fit_is_refused(
    copy: Path, tag: str, changelog: str, fragment: str | None, said: str
) -> None:
    shutil.copy(ROOT / "release/check.py", copy / "release")
    (copy / "CHANGELOG.md").write_text(changelog, encoding="utf-8")
    (copy / "changelog.d").mkdir()
    (copy / "changelog.d/README.md").touch()
    if fragment is not None:
        (copy / "changelog.d" / fragment).touch()
    code = f"import check; check.check_tag({tag!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=copy / "release", capture_output=True, text=True, check=False
    )
    assert (done.returncode == 0) == (not said)
    assert said in done.stderr
