"""Pages as tests see them: fenced blocks in order, and the commands in those for a shell."""

import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
HISTORY = ROOT / "docs/history"
"""Lists of their time, which are no pages of the site."""
DOCS = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").rglob("*.md") if page.parent != HISTORY)]
OTHERS = [ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("examples/*/README.md"))]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DOORS = ("peftcore", ".venv/bin/peftcore")


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    language: str
    text: str

    def commands(self) -> Iterator[list[str]]:
        """The words of each command; a line that ends in a backslash goes on in the next one."""
        for line in self.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


def blocks(page: Path) -> list[Block]:
    """All blocks of a page, in order."""
    return [Block(language, text) for language, text in FENCE.findall(page.read_text(encoding="utf-8"))]


def of_peftcore(words: list[str]) -> list[str] | None:
    """What a command line says to ours, also behind torchrun or accelerate; None when it is not ours."""
    if words[0] in DOORS:
        return words[1:]
    ours = [at for at, pair in enumerate(itertools.pairwise(words)) if pair == ("-m", "peftcore")]
    return words[ours[0] + 2 :] if ours else None


def name(page: Path) -> str:
    """For test ids."""
    return page.relative_to(ROOT).as_posix()
