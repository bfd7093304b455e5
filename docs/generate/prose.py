"""The text of a method, plain text in its module, as HTML: paragraphs, equations typeset, papers and methods linked.

It is escaped here and not read as Markdown, to which its products are emphasis.
"""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Callable
from itertools import groupby

from notation import mathml

PAPER = re.compile(r"arXiv (\d{4}\.\d{4,5})")
CODE = re.compile(r"``(.+?)``|`(.+?)`")


def as_html(text: str, page_of: Callable[[str], str | None]) -> str:
    """All of a docstring, below its headline; `page_of` says where the page of a method is."""
    blocks = [block for paragraph in text.split("\n\n") for block in _blocks(paragraph)]
    return "\n".join(_block(indented, lines, page_of) for indented, lines in blocks)


def inline(text: str, page_of: Callable[[str], str | None] = lambda name: None) -> str:
    """A line or a paragraph."""

    def code(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        page = page_of(name)
        return f'<a href="{page}"><code>{name}</code></a>' if page else f"<code>{name}</code>"

    def paper(match: re.Match[str]) -> str:
        return f'<a href="https://arxiv.org/abs/{match[1]}">arXiv {match[1]}</a>'

    return CODE.sub(code, PAPER.sub(paper, html.escape(text, quote=False)))


def _blocks(paragraph: str) -> list[tuple[bool, list[str]]]:
    lines = groupby(paragraph.splitlines(), lambda line: line.startswith(" "))
    return [(indented, list(block)) for indented, block in lines]


def _block(indented: bool, lines: list[str], page_of: Callable[[str], str | None]) -> str:
    if indented:
        return mathml(textwrap.dedent("\n".join(lines)))
    return f"<p>{inline(' '.join(lines), page_of)}</p>"
