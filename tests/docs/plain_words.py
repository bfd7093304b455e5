"""Counts sentences that an ML engineer reads twice, by six patterns, in public docstrings and in pages.

    python tests/docs/plain_words.py            counts
    python tests/docs/plain_words.py subject    prints each sentence of one pattern, with its file

A pattern is a regular expression, so it counts some good sentences and misses some bad ones: the number tells in which
direction the text goes.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATTERNS = {
    "pronoun": r"\bof (?:its|their) own\b|\bof (?:these|those)\b|\bones? of (?:its|their)\b",
    "what": r"(?:^|[,;:] |\b(?:of|in|to|from|with|by|for|and|is|are|on|than|as|at) )[Ww]hat (?!to\b)\w+|\bthat which\b",
    "inverted": r"^(?:Which|Whose|What|Where|Whether|How)\b[^?]*\b(?:says?|is said|decides?|tells?|shows?)\b[^?]*$",
    "negative": r"\b(?:is|are|was|has|have) no(?:ne)?\b|\bnothing but\b|\bno (?:more|longer) than\b|\bno other\b",
    "subject": r"\b(?:[Ss]omebody|[Nn]obody|[Ee]verybody)\b|(?:^|[,;:] )(?:[Ww]ho|[Oo]thers)\b",
    "metaphor": r"\b(?:stands?|lies?|lie|comes?|goes|tells?|told|beside|hands? out|brings?)\b",
}
"""Names of the patterns, in order of harm, with their regular expressions; they are tried on single sentences."""
END = re.compile(r"(?<=[.!?:])\s+(?=[A-Z`*\"])")
CODE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"``.*?``|`[^`]*`")
LABEL = re.compile(r"^(?:Args|Raises|Yields|Attributes|Example): ")


def sentences(text: str) -> Iterator[str]:
    """Yields the sentences of a docstring or a page, without code, tables and headings."""
    for block in re.split(r"\n\s*\n|\n(?=\s*[-*|#] )", CODE.sub("", text)):
        plain = LABEL.sub("", " ".join(INLINE.sub("`x`", block).split()).lstrip("-* "))
        if plain.startswith(("|", "#", ">>>", "::")):
            continue
        for sentence in END.split(plain):
            if len(sentence.split()) > 2:
                yield sentence


def docstrings(source: str) -> Iterator[str]:
    """Yields the docstrings of a module, of its public classes and functions, and those below public values."""

    def below(node: ast.Module | ast.ClassDef) -> Iterator[str]:
        if text := ast.get_docstring(node):
            yield text
        for each, after in zip_longest(node.body, node.body[1:]):
            if isinstance(each, ast.ClassDef) and not each.name.startswith("_"):
                yield from below(each)
            elif isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef) and not each.name.startswith("_"):
                if text := ast.get_docstring(each):
                    yield text
            elif isinstance(each, ast.Assign | ast.AnnAssign):
                match after:
                    case ast.Expr(value=ast.Constant(value=str(text))):
                        yield text

    return below(ast.parse(source))


def texts() -> Iterator[tuple[str, Path, str]]:
    """Yields the kind of each text, "docstrings" or "pages", its file and itself."""
    for file in sorted([*ROOT.glob("peftcore/**/*.py"), *ROOT.glob("plugins/*/peftcore_*/**/*.py")]):
        for text in docstrings(file.read_text(encoding="utf-8")):
            yield "docstrings", file, text
    for file in sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]):
        yield "pages", file, file.read_text(encoding="utf-8")


def matching(sentence: str) -> list[str]:
    """Returns the names of the patterns that a sentence has."""
    return [name for name, pattern in PATTERNS.items() if re.search(pattern, sentence)]


def counts() -> dict[str, dict[str, int]]:
    """Returns, for each kind of text, the number of sentences, of those with any pattern, and of those with each."""
    found = {kind: dict.fromkeys(["sentences", "any", *PATTERNS], 0) for kind in ("docstrings", "pages")}
    for kind, _, text in texts():
        for sentence in sentences(text):
            names = matching(sentence)
            for name in ("sentences", *(["any"] if names else []), *names):
                found[kind][name] += 1
    return found


if __name__ == "__main__":
    if len(sys.argv) > 1:
        for _, file, text in texts():
            for sentence in sentences(text):
                if sys.argv[1] in matching(sentence):
                    print(f"{file.relative_to(ROOT)}: {sentence}")
    else:
        for kind, found in counts().items():
            share = 100 * found["any"] / found["sentences"]
            print(f"{kind}: {share:.1f} % of {found['sentences']:,} sentences", found)
