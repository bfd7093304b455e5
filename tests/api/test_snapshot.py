"""What users and authors may rely on is still there: names, signatures and imports as snapshot.json recorded them.

The snapshot holds what may not break: every public name. ``python tests/api/make_snapshot.py`` adds new ones to it and
changes nothing that it has. New names, new optional parameters at the end and new keyword-only ones are no break.
"""

import copy
import json
from typing import Any

import pytest
from make_snapshot import FILE, ROOT, described, public, works

RECORDED = json.loads(FILE.read_text(encoding="utf-8"))
GONE: dict[str, str] = {}
"""What was taken out on purpose, and the reason that the release notes give: a name ("peftcore.Injection.save"), a
parameter ("peftcore.apply(seed)") or an import as it is recorded. Each is
named in CHANGELOG.md too, or in a fragment for it."""
KEYWORD, POSITIONAL = "keyword_only", ("positional_only", "positional_or_keyword")

Described = dict[str, Any]


def broken(name: str, recorded: Described, now: Described | None) -> dict[str, str]:
    """What is not as recorded, by the name of what it is about."""
    if now is None:
        return {name: "is gone"}
    if now["kind"] != recorded["kind"]:
        return {name: f"is a {now['kind']}, was a {recorded['kind']}"}
    found = {}
    if recorded.get("type") != now.get("type"):
        found[name] = f"is of type {now.get('type')}, was {recorded.get('type')}"
    for base in set(recorded.get("bases", ())) - set(now.get("bases", ())):
        found[name] = f"is no {base} any more"
    if "parameters" in recorded:
        found |= _broken_call(name, recorded["parameters"], now.get("parameters", []))
    for member, each in recorded.get("members", {}).items():
        found |= broken(f"{name}.{member}", each, now["members"].get(member))
    return found


def _broken_call(name: str, recorded: list[Any], now: list[Any]) -> dict[str, str]:
    there = {parameter[0]: parameter for parameter in now}
    found = {f"{name}({each[0]})": "is gone" for each in recorded if each[0] not in there}
    for old in recorded:
        if old[0] in there and there[old[0]] != old:
            found[f"{name}({old[0]})"] = f"is {there[old[0]][1:]}, was {old[1:]}"
    known = {parameter[0] for parameter in recorded}
    for new, kind, default in now:
        if new not in known and default is None and not kind.startswith("var_"):
            found[f"{name}({new})"] = "is new and must be given"
    before, after = ([p[0] for p in each if p[1] in POSITIONAL] for each in (recorded, now))
    if not found and after[: len(before)] != before:
        found[name] = f"takes {', '.join(after)} in this order, took {', '.join(before)}"
    return found


@pytest.fixture(scope="module")
def problems() -> dict[str, str]:
    """Everything that is not as recorded."""
    names = public()
    found: dict[str, str] = {}
    for name, recorded in RECORDED["names"].items():
        found |= broken(name, recorded, described(names[name], names) if name in names else None)
    return found | {each: "is gone" for each in RECORDED["imports"] if not works(each)}


def test_nothing_broke(problems: dict[str, str]) -> None:
    assert {name: what for name, what in problems.items() if name not in GONE} == {}


def test_every_public_name_is_recorded() -> None:
    assert sorted({*public()} - {*RECORDED["names"]}) == [], "run python tests/api/make_snapshot.py"


def test_what_is_gone_is_gone_and_in_the_release_notes(problems: dict[str, str]) -> None:
    files = [ROOT / "CHANGELOG.md", *ROOT.glob("changelog.d/*.removed.md")]
    notes = "\n".join(path.read_text(encoding="utf-8") for path in files)
    for name, reason in GONE.items():
        assert problems.get(name) == "is gone", name
        assert reason
        assert name.rstrip(")").replace("(", ".").replace(" ", ".").rpartition(".")[2] in notes, name


APPLY = {"kind": "function", "parameters": [["model", POSITIONAL[1], None], ["seed", KEYWORD, "0"]]}
CLASS = {"kind": "class", "bases": ["peftcore.author.Site"], "members": {"save": APPLY, "sites": {"kind": "value"}}}


def changed(recorded: Described, **changes: Any) -> Described:
    return {**copy.deepcopy(recorded), **changes}


@pytest.mark.parametrize(
    ("recorded", "now", "found"),
    [
        (APPLY, None, {"x": "is gone"}),
        (APPLY, changed(APPLY, parameters=APPLY["parameters"][:1]), {"x(seed)": "is gone"}),
        (APPLY, changed(APPLY, parameters=[["model", POSITIONAL[1], None], ["seed", KEYWORD, "1"]]), {"x(seed)"}),
        (APPLY, changed(APPLY, parameters=[["new", POSITIONAL[1], "0"], *APPLY["parameters"]]), {"x"}),
        (APPLY, changed(APPLY, parameters=[*APPLY["parameters"], ["new", KEYWORD, None]]), {"x(new)"}),
        (APPLY, {"kind": "constant", "type": "int"}, {"x"}),
        (CLASS, changed(CLASS, members={"save": APPLY}), {"x.sites": "is gone"}),
        (CLASS, changed(CLASS, bases=[]), {"x"}),
        (CLASS, changed(CLASS, members={**CLASS["members"], "sites": APPLY}), {"x.sites"}),
    ],
)
def test_breaks_are_seen(recorded: Described, now: Described | None, found: dict[str, str] | set[str]) -> None:
    assert broken("x", recorded, recorded) == {}
    seen = broken("x", recorded, now)
    assert (seen if isinstance(found, dict) else set(seen)) == found


def test_additions_are_no_breaks() -> None:
    more = [*APPLY["parameters"], ["new", KEYWORD, "None"]]
    more.insert(1, ["last", POSITIONAL[1], "None"])
    assert broken("x", APPLY, changed(APPLY, parameters=more)) == {}
    assert broken("x", CLASS, changed(CLASS, members={**CLASS["members"], "new": APPLY})) == {}


def test_imports_that_do_not_work_are_seen() -> None:
    assert works("from peftcore import apply")
    assert not works("from peftcore import never")
    assert not works("import peftcore.never")
