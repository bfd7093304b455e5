"""Each method with its authors' numbers has rows for all that can be compared, or says why not; and these numbers are
those of its authors."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

import peftcore
from peftcore.registry.evidence import AUTHORS, FILE, OTHERS, PARTS, Evidence, read

ROOT = Path(__file__).parents[2]
PLUGINS = sorted(path.name for path in (ROOT / "plugins").iterdir() if path.is_dir() and path.name != "lab")
PAPERS: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("papers.yaml").read_text())


def evidence(plugin: str) -> Evidence:
    return read(ROOT / "plugins" / plugin / f"peftcore_{plugin}" / FILE)


def lacking(plugin: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "plugins" / plugin / "tests/lacking.yaml").read_text())
    return found


def wrong(evidence: Evidence, told: dict[str, Any]) -> list[str]:
    """What is compared and said to lack, or the other way round, or said twice."""
    by_authors = {
        name: {row.part for row in rows if row.source.name == AUTHORS}
        for name, rows in evidence.items()
        if any(row.source.name == AUTHORS for row in rows)
    }
    lines = [f"{name} has no numbers of its authors" for name in {*told["open"], *told["reasons"]} - by_authors.keys()]
    for name, compared in by_authors.items():
        said = Counter([*compared, *told["open"].get(name, ()), *told["reasons"].get(name, ())])
        lines += [f"{name}: {part} has no row and no reason in lacking.yaml" for part in PARTS if not said[part]]
        lines += [f"{name}: {part} has a row, and lacking.yaml says no" for part in compared if said[part] > 1]
        lines += [f"{name}: {part} is in lacking.yaml twice" for part in {*PARTS} - compared if said[part] > 1]
        lines += [f"{name}: there is no part {part}" for part in {*said} - {*PARTS}]
    return sorted(lines)


@pytest.mark.parametrize("plugin", PLUGINS)
def test_each_part_is_compared_or_says_why_not(plugin: str) -> None:
    assert wrong(evidence(plugin), lacking(plugin)) == []


@pytest.mark.parametrize("plugin", PLUGINS)
def test_what_nobody_has_compared_yet_only_falls(plugin: str) -> None:
    told = lacking(plugin)
    assert sum(map(len, told["open"].values())) == told["most"], "write the smaller number; it may not rise"


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_reason_says_why_it_cannot_be(plugin: str) -> None:
    for name, reasons in lacking(plugin)["reasons"].items():
        for part, reason in reasons.items():
            assert len(reason.split()) > 4, f"{name}: {part}: {reason!r} is no reason"
            assert not {"yet", "todo", "later"} & {*reason.lower().split()}, f"{name}: {part} belongs to `open`"


@pytest.mark.parametrize("plugin", PLUGINS)
def test_authors_are_those_of_the_methods_paper(plugin: str) -> None:
    for name, rows in evidence(plugin).items():
        for source in {row.source for row in rows if row.source.name in (AUTHORS, OTHERS)}:
            papers = PAPERS[source.repository]["papers"]
            paper = peftcore.method(f"{plugin}/{name}").tags.paper
            assert (paper in papers) is (source.name == AUTHORS), (
                f"{name}: {source.repository} is of the authors of {papers}, the method of {paper}: "
                f'declare "{AUTHORS}" or "{OTHERS}" accordingly, or correct papers.yaml'
            )


def test_what_is_wrong_is_found(tmp_path: Path) -> None:
    file = tmp_path / FILE
    file.write_text(
        '{"a": [{"name": "authors", "repository": "o/a", "commit": "1", "script": "a.py", "compared": ["outputs"]}],'
        ' "b": [{"name": "peft 0.21"}]}'
    )
    rows, why = read(file), "nothing is drawn and nothing trains"
    assert wrong(rows, {"open": {"a": ["start", "trains"]}, "reasons": {"a": {"defaults": why}}}) == []
    assert wrong(rows, {"open": {"a": ["start", "trains"]}, "reasons": {}}) == [
        "a: defaults has no row and no reason in lacking.yaml"
    ]
    assert wrong(rows, {"open": {"a": ["start", "trains"]}, "reasons": {"a": {"start": why, "outputs": why}}}) == [
        "a: defaults has no row and no reason in lacking.yaml",
        "a: outputs has a row, and lacking.yaml says no",
        "a: start is in lacking.yaml twice",
    ]
    assert wrong(rows, {"open": {"a": [*PARTS[1:], "end"], "b": ["start"]}, "reasons": {}}) == [
        "a: there is no part end",
        "b has no numbers of its authors",
    ]
