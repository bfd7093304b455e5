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


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Pages that are made come with links that hold."""
    address: str = page.file.src_uri
    written = (ROOT / "docs" / address).exists()
    return mended(markdown, f"docs/{address}", address) if written else markdown
