"""Called by mkdocs-gen-files: writes the pages that are not in the repository."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # mkdocs runs this file by itself

import mkdocs_gen_files

import api_pages
import facts
import method_pages
import taxonomy
from links import ROOT, copies, mended


def write(address: str, content: str | bytes) -> None:
    """A file of the site."""
    binary = isinstance(content, bytes)
    with mkdocs_gen_files.open(address, "wb" if binary else "w", **({} if binary else {"encoding": "utf-8"})) as file:
        file.write(content)


for source, address in copies().items():
    path = ROOT / source
    write(address, mended(path.read_text("utf-8"), source, address) if path.suffix == ".md" else path.read_bytes())
for method in facts.every():
    write(f"methods/{method.name}.md", method_pages.page(method))
write("methods/index.md", taxonomy.page())
for address, text in api_pages.pages().items():
    write(address, text)
