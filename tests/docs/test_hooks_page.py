"""docs/hooks.md has every hook, in order, with its exact signature, the right kind of answer, and an example."""

import inspect
import re
from pathlib import Path

import peftcore_lab
from peftcore import core_plugin
from peftcore.contract import hookspecs

PAGE = (Path(__file__).parents[2] / "docs/hooks.md").read_text(encoding="utf-8")
HOOKS = [name for name in vars(hookspecs) if name.startswith("peftcore_")]
SECTIONS = dict(re.findall(r"^## (peftcore_\w+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


def signature(hook: str) -> str:
    """As it stands in the file; annotations there are texts."""
    return hook + str(inspect.signature(getattr(hookspecs, hook))).replace("'", "")


def test_every_hook_has_a_section_in_the_order_of_the_specifications() -> None:
    assert list(SECTIONS) == HOOKS


def test_signatures_are_exact() -> None:
    shown = {hook: re.search(r"\A\n`(.*)`\n", text) for hook, text in SECTIONS.items()}
    assert {hook: found and found[1] for hook, found in shown.items()} == {hook: signature(hook) for hook in HOOKS}


def test_every_section_has_a_plugin_that_answers() -> None:
    assert [hook for hook in HOOKS if not re.search(rf"@hookimpl.*\ndef {hook}\(", SECTIONS[hook])] == []


def test_the_table_says_whose_answers_count() -> None:
    rows = dict(re.findall(r"^\| \[`(\w+)`\]\(#\w+\) \| ([\w, ]+) \|", PAGE, re.MULTILINE))
    first = {hook: getattr(hookspecs, hook).peftcore_spec["firstresult"] for hook in HOOKS}
    assert rows == {hook: "first" if first[hook] else "all, put together" for hook in HOOKS}


def test_the_table_names_all_that_the_core_brings() -> None:
    rows = dict(re.findall(r"^\| \[`(\w+)`\]\(#\w+\) \| [\w, ]+ \| ([\w, -]+) \|", PAGE, re.MULTILINE))
    assert rows["peftcore_formats"] == ", ".join(core_plugin.peftcore_formats())
    assert f"brings nine tasks itself: {', '.join(peftcore_lab.peftcore_tasks())}." in " ".join(PAGE.split())
