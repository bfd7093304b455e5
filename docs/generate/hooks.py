"""Called by mkdocs: mends the links of pages that are written by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # mkdocs runs this file by itself

from links import ROOT, mended


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Pages that are made come with links that hold."""
    address: str = page.file.src_uri
    written = (ROOT / "docs" / address).exists()
    return mended(markdown, f"docs/{address}", address) if written else markdown
