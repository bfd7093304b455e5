"""Links of a page on a plain git host, made to hold in the site too.

What leaves `docs/` and has a page in the site leads there; what has none (sources, folders) stays as its path, in code.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOTS = {"README.md": "index.md"} | {name: name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")}
"""Pages of the root; the README is the home page."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
OUTSIDE = re.compile(r"[a-z]+:|#|/")


def copies() -> dict[str, str]:
    """Files outside `docs/` that the site has, by their path in the repository: where they stand in it."""
    found = {source: page for source, page in ROOTS.items() if (ROOT / source).exists()}
    for page in sorted(ROOT.glob("examples/*/README.md")):
        name = page.parent.name
        found[f"examples/{name}/README.md"] = f"examples/{name}.md"
        found |= {
            f"examples/{name}/{picture.name}": f"examples/{name}/{picture.name}" for picture in _pictures(page.parent)
        }
    return found | {
        f"benchmarks/{picture.name}": f"benchmarks/{picture.name}" for picture in _pictures(ROOT / "benchmarks")
    }


def mended(text: str, source: str, page: str) -> str:
    """The text of a file of the repository with links for its page in the site.

    Args:
        source: the file's path in the repository, which its links start from.
        page: where it stands in the site.
    """
    known = copies()

    def link(match: re.Match[str]) -> str:
        picture, label, address = match.groups()
        if OUTSIDE.match(address):
            return match[0]
        place, _, anchor = address.partition("#")
        found = posixpath.normpath(posixpath.join(posixpath.dirname(source), place))
        goal = _in_site(found, known)
        if goal is None:
            return label if f"`{found}`" in label else f"{label} (`{found}`)"
        way = posixpath.relpath(goal, posixpath.dirname(page) or ".")
        return f"{picture}[{label}]({way}{'#' + anchor if anchor else ''})"

    pieces = re.split(f"({FENCE.pattern})", text, flags=FENCE.flags)
    return "".join(piece if piece.startswith("```") else LINK.sub(link, piece) for piece in pieces)


def _in_site(path: str, known: dict[str, str]) -> str | None:
    """Where a file of the repository stands in the site, as a page or a picture."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return known.get(path) or known.get(f"{path.rstrip('/')}/README.md")


def _pictures(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.png"))
