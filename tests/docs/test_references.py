"""What pages, docstrings and comments name is there: files and folders of the repository, modules, decision records,
rules."""

import pkgutil
import re
import sys
import warnings
from functools import cache
from pathlib import Path

import pytest
from doc_pages import DOCS, HISTORY, OTHERS, ROOT, name

RECORDS = ROOT / "docs/decisions"
OF_THEIR_TIME = {*RECORDS.glob("[0-9]*.md"), *HISTORY.glob("*.md"), ROOT / "CHANGELOG.md"}
"""These name what was there when they were written, and what is gone."""
PAGES = [
    *DOCS,
    *OTHERS,
    *HISTORY.glob("*.md"),
    ROOT / "CHANGELOG.md",
    ROOT / "SECURITY.md",
    *sorted(ROOT.glob("plugins/*/README.md")),
]
FOLDERS = ("peftcore", "plugins", "docs", "tests", "benchmarks", "examples", "release")
SOURCES = sorted(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*.py"))
NAMES = {path.name for path in (*SOURCES, *DOCS, *OTHERS, *ROOT.glob("*.*"))}
FILE = re.compile(r"`([\w./-]+\.(?:md|py)|(?:" + "|".join(FOLDERS) + r")/[\w./-]*)`")
"""What is in backticks and is a page, a source, or begins with a folder of the repository."""
DOTTED = re.compile(r"`(peftcore(?:\.\w+)+)(?:\(\))?`")
ADDRESS = re.compile(r"\]\(([^)\s]+)\)")
RECORD = re.compile(r"decisions/(\d{3})\b|\brecord (\d{3})\b|\[(\d{3})\]\(")
RULE = re.compile(r"\bR(\d+)\b(?:\s+to\s+R(\d+)\b)?")


def missing_files(text: str, folder: Path) -> list[str]:
    """Those named in a text of a folder: by a path from the root or from there, or by a name alone."""
    named = FILE.findall(text)
    return [
        each
        for each in named
        if not ((ROOT / each).exists() or (folder / each).exists() or ("/" not in each and each in NAMES))
    ]


def missing_names(text: str) -> list[str]:
    return [each for each in DOTTED.findall(text) if not is_there(each)]


@cache
def is_there(dotted: str) -> bool:
    """Whether a name of ours can be imported, and not by its old path alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "peftcore", DeprecationWarning)
        try:
            pkgutil.resolve_name(dotted)
        except (AttributeError, ImportError, DeprecationWarning):
            return False
    steps = dotted.split(".")
    path = next(path for at in range(len(steps), 0, -1) if (path := ".".join(steps[:at])) in sys.modules)
    module = sys.modules[path]
    return module.__name__ == path and module.__spec__ is not None and module.__spec__.has_location


def missing_records(text: str) -> list[str]:
    numbers = {number for found in RECORD.findall(text) for number in found if number}
    return sorted(number for number in numbers if not list(RECORDS.glob(f"{number}-*.md")))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_pages_name_what_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not missing_records(text)
    if page not in OF_THEIR_TIME:
        assert not missing_files(text, page.parent)
        assert not missing_names(text)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    """Those into `docs/methods` and `docs/api` are to pages that are made; mkdocs looks at them."""
    places = [address.partition("#")[0] for address in ADDRESS.findall(page.read_text(encoding="utf-8"))]
    local = [place for place in places if place and ":" not in place and not place.startswith(("methods/", "api/"))]
    assert not [place for place in local if not (page.parent / place).exists()]


@pytest.mark.parametrize("folder", FOLDERS)
def test_sources_name_what_is_there(folder: str) -> None:
    wrong = []
    for path in SOURCES:
        if path.is_relative_to(ROOT / folder) and path != Path(__file__):
            text = path.read_text(encoding="utf-8")
            missing = [*missing_files(text, path.parent), *missing_names(text), *missing_records(text)]
            wrong += [f"{name(path)}: {each}" for each in missing]
    assert not wrong


CODE_NAME = re.compile(r"`([A-Za-z_][\w.]*)(?:\(\))?`")
OTHERS_NAMES = ("torch.", "transformers.", "diffusers.", "peft.")


@cache
def words_of_the_code() -> frozenset[str]:
    words = {word for path in SOURCES for word in re.findall(r"\w+", path.read_text(encoding="utf-8"))}
    return frozenset(words | {part for path in SOURCES for part in path.relative_to(ROOT).with_suffix("").parts})


@pytest.mark.parametrize("record", sorted(RECORDS.glob("[0-9]*.md")), ids=lambda path: path.name[:3])
def test_names_in_a_record_exist_or_it_is_superseded(record: Path) -> None:
    text = record.read_text(encoding="utf-8")
    if re.search(r"^(?:Date: )?[\d-]+\. Status: superseded by \[", text, re.MULTILINE):
        return
    named = {each for each in CODE_NAME.findall(text) if not each.startswith(OTHERS_NAMES)}
    assert sorted(each for each in named if not words_of_the_code().issuperset(each.split("."))) == []


def test_the_index_has_every_record_once() -> None:
    index = (RECORDS / "README.md").read_text(encoding="utf-8").partition("## By package")[2]
    linked = re.findall(r"\[(\d{3})\]\((\S+)\) [^;|]+", index)
    assert sorted(linked) == sorted((path.name[:3], path.name) for path in RECORDS.glob("[0-9]*.md"))


def test_rules_are_those_of_the_page() -> None:
    """Whoever reads a rule's number in `peftcore/roles` finds the rule."""
    written = set(re.findall(r"^- \*\*R(\d+), ", (ROOT / "docs/roles.md").read_text(encoding="utf-8"), re.MULTILINE))
    cited = set()
    for path in (ROOT / "peftcore/roles").glob("*.py"):
        for first, last in RULE.findall(path.read_text(encoding="utf-8")):
            cited |= {str(number) for number in range(int(first), int(last or first) + 1)}
    assert cited == written


def test_what_is_missing_is_seen() -> None:
    text = "See `peftcore/gone.py`, `gone.md`, `peftcore.gone.thing`, `peftcore.apply()`, `README.md` and record 999."
    assert missing_files(text, ROOT) == ["peftcore/gone.py", "gone.md"]
    assert missing_names(text) == ["peftcore.gone.thing"]
    assert missing_records(text) == ["999"]
    assert missing_records("[998](decisions/998-gone.md), [001](decisions/001-one-hook-for-layers.md)") == ["998"]
    assert missing_names("`peftcore.merging`") == ["peftcore.merging"], "an old place is not where it is"
