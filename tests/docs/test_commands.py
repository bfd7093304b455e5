"""Commands in README, docs and the examples' pages exist, with their flags; so do the files and targets that they
name."""

import re
from pathlib import Path
from typing import Any

import pytest
import typer.main
from doc_pages import DOCS, OTHERS, ROOT, Block, blocks, name, of_peftcore

from peftcore.cli.commands import app
from peftcore.cli.commands._method_options import WithMethodOptions

SHELL = ("bash", "")
GROUP: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = {name: GROUP.get_command(None, name) for name in GROUP.list_commands(None)}
TARGETS = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def lines(page: Path) -> list[list[str]]:
    """Every command of ours, of make and of python."""
    found = [words for block in blocks(page) if block.language in SHELL for words in _words(block)]
    return [words for words in found if of_peftcore(words) or words[0] in ("make", "python")]


def _words(block: Block) -> list[list[str]]:
    """The words of each line; blocks without a language may hold anything, quotes of one side only too."""
    split = [line.partition("#")[0].split() for line in block.text.replace("\\\n", " ").splitlines()]
    return [words for words in split if words]


PAGES = [page for page in [*DOCS, *OTHERS] if lines(page)]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_are_there(page: Path) -> None:
    assert [wrong for words in lines(page) if (wrong := missing(words))] == []


def missing(words: list[str]) -> str | None:
    """What of a command line there is not."""
    ours = of_peftcore(words)
    if ours is not None:
        return _missing_here(ours)
    if words[0] == "make":
        return next((f"make {word}" for word in words[1:] if "=" not in word and word not in TARGETS), None)
    there = not words[1].endswith(".py") or (ROOT / words[1]).is_file()
    return None if there else words[1]


def _missing_here(words: list[str]) -> str | None:
    if words[0] not in COMMANDS:
        return f"peftcore {words[0]}"
    flags = {flag for each in COMMANDS[words[0]].params for flag in (*each.opts, *each.secondary_opts)} | {"--help"}
    if isinstance(COMMANDS[words[0]], WithMethodOptions):
        flags |= {"--rank", "--target"}  # of the methods that pages use so
    given = [word.partition("=")[0] for word in words[1:] if word.startswith("-")]
    return next((f"peftcore {words[0]} {flag}" for flag in given if flag not in flags), None)


@pytest.mark.parametrize("line", ["peftcore sow lora", "peftcore show --rank", "make tea", "python examples/none.py"])
def test_what_is_not_there_is_seen(line: str) -> None:
    assert missing(line.split()) is not None
