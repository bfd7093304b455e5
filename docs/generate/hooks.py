"""Called by mkdocs: the order of pages, and links of those that are written by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # mkdocs runs this file by itself

from links import ROOT, mended
from navigation import nav


def on_config(config: Any) -> Any:
    """Methods are known only now."""
    config.nav = nav()
    return config


BOOSTS = {"methods/": 1.0, "api/": 0.5, "decisions/": 0.25, "examples/": 1.0, "CHANGELOG": 0.25, "upgrade": 0.5}
"""How much a hit in a page counts for search, by the beginning of the page's address."""
GUIDE = 4.0
"""Of all other pages: those that say how something is done."""


def boost(address: str) -> float:
    """Guides come before pages of methods, and both before records."""
    return next((value for start, value in BOOSTS.items() if address.startswith(start)), GUIDE)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Pages that are made come with links that hold. How search ranks a page stands here and not in the page: a plain
    git host would show it."""
    address: str = page.file.src_uri
    page.meta.setdefault("search", {"boost": boost(address)})
    if address == "index.md":
        page.meta["hide"] = ["navigation"]  # it would list the page itself, and takes a fifth of the width
    written = (ROOT / "docs" / address).exists()
    return mended(markdown, f"docs/{address}", address) if written else markdown
