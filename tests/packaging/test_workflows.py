"""Continuous integration says what is there: files that parse, make targets that exist, and the releases that are
promised."""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))
YAML = [*WORKFLOWS, *sorted(ROOT.glob(".github/ISSUE_TEMPLATE/*.yml")), ROOT / ".pre-commit-config.yaml"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = {*re.findall(r"^([a-z][a-z-]*(?: [a-z][a-z-]*)*):(?!=)", MAKEFILE, re.MULTILINE)}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def jobs(path: Path) -> dict[str, Any]:
    found = read(path)["jobs"]
    assert isinstance(found, dict)
    return found


def matrix(workflow: str, job: str) -> dict[str, Any]:
    found = jobs(ROOT / f".github/workflows/{workflow}.yml")[job]["strategy"]["matrix"]
    assert isinstance(found, dict)
    return found


def made(command: str) -> set[str]:
    """Targets of make in a shell command, whatever is on its other lines."""
    words = [shlex.split(line, comments=True) for line in re.sub(r"\$\{\{.*?\}\}", "", command).splitlines()]
    return {each for line in words if line[:1] == ["make"] for each in line[1:] if "=" not in each}


def missing(targets: set[str]) -> set[str]:
    known = {each for line in TARGETS for each in line.split()} | {".venv/.installed"}
    return targets - known


@pytest.mark.parametrize("path", YAML, ids=relative)
def test_files_parse(path: Path) -> None:
    assert isinstance(read(path), dict)


@pytest.mark.parametrize("path", WORKFLOWS, ids=relative)
def test_steps_of_a_workflow_can_run(path: Path) -> None:
    """Each has a command or an action of some version, commands name targets and scripts that exist, and jobs need jobs
    that are there."""
    for job in jobs(path).values():
        assert {job["needs"]} <= jobs(path).keys() if "needs" in job else True
        assert job["runs-on"]
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            assert "uses" not in step or re.fullmatch(r"[\w.-]+/[\w.-]+@[\w./-]+", step["uses"])
            assert not missing(made(step.get("run", "")))
            assert all((ROOT / each).is_file() for each in re.findall(r"^\.ci/\w+", step.get("run", "")))


def test_the_script_of_continuous_integration_makes_what_is_there() -> None:
    targets = made((ROOT / ".ci/run").read_text(encoding="utf-8"))
    assert targets == {"test", "test-slow"} and not missing(targets)


def test_a_target_that_is_gone_is_seen() -> None:
    assert missing(made("make test PART=1/4\nmake tset")) == {"tset"}


def test_no_workflow_may_write_but_the_one_that_publishes() -> None:
    for path in WORKFLOWS:
        assert read(path)["permissions"] == {"contents": "read"}, path
        allowed = {name: job["permissions"] for name, job in jobs(path).items() if "permissions" in job}
        assert allowed == ({"publish": {"id-token": "write"}} if path.stem == "publish" else {})


def test_what_is_published_is_what_was_checked_and_tagged() -> None:
    workflow = read(ROOT / ".github/workflows/publish.yml")
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML reads `on` so
    build, publish = workflow["jobs"]["build"]["steps"], workflow["jobs"]["publish"]["steps"]
    assert any(step.get("run") == "make release-check TAG=${{ github.ref_name }}" for step in build)
    (uploaded,), (taken,) = (
        [step["with"] for step in steps if step.get("uses", "").startswith(f"actions/{which}load-artifact@")]
        for steps, which in ((build, "up"), (publish, "down"))
    )
    assert (uploaded["name"], uploaded["path"]) == (taken["name"], taken["path"]) == ("dist", "dist/")
    assert not any("run" in step for step in publish)


def lower_bound(requirement: Requirement) -> Version:
    (bound,) = (Version(each.version) for each in requirement.specifier if each.operator == ">=")
    return bound


def promised() -> dict[str, Version]:
    """The oldest release that each requirement of the core and of its command line allows."""
    extras = PROJECT["optional-dependencies"]
    found = map(Requirement, [*PROJECT["dependencies"], *extras["cli"], *extras["diffusion"]])
    return {each.name: lower_bound(each) for each in found if not each.name.startswith("peftcore")}


def test_the_oldest_releases_that_are_promised_are_tested() -> None:
    (oldest,) = matrix("tests", "oldest")["include"]
    tested = {(each := Requirement(word)).name: each for word in oldest["releases"].split()}
    assert {"torch", "transformers"} < tested.keys()
    for name, requirement in tested.items():
        assert requirement.specifier == SpecifierSet(f"=={promised()[name]}.*"), name
    default = re.findall(r"^OLDEST := (.*)$", MAKEFILE, re.MULTILINE)
    assert default == [oldest["releases"]]


def test_the_first_and_the_last_python_that_are_promised_are_tested() -> None:
    classifiers = [each.rpartition(" ")[2] for each in PROJECT["classifiers"] if "Python :: 3." in each]
    versions = sorted(classifiers, key=Version)
    assert matrix("tests", "tests")["python"] == [versions[0], versions[-1]]
    assert PROJECT["requires-python"] == f">={versions[0]}"
    assert [each["python"] for each in matrix("tests", "oldest")["include"]] == versions[:1]


def test_the_week_goes_through_the_whole_matrix() -> None:
    parts = matrix("newest", "newest")["part"]
    assert parts == [f"{part}/{len(parts)}" for part in range(1, len(parts) + 1)]


def test_hooks_before_a_commit_run_what_is_there() -> None:
    (local,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert local["repo"] == "local"
    entries = [shlex.split(hook["entry"]) for hook in local["hooks"]]
    assert [entry[:2] for entry in entries[:2]] == [[".venv/bin/ruff", "check"], [".venv/bin/ruff", "format"]]
    tests = [Path(word) for entry in entries for word in entry if word.startswith("tests/")]
    assert tests and all((ROOT / each).is_file() for each in tests)
