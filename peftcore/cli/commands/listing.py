"""What is installed: ``peftcore methods``."""

from __future__ import annotations

from typing import Annotated

import typer

from peftcore.cli.app import Json, answered, app
from peftcore.cli.errors import BadInput


@app.command()
def methods(
    category: Annotated[str | None, typer.Option(help="One category of the survey.")] = None,
    sizes: Annotated[bool, typer.Option("--sizes", help="Also plan each in known models: what would train.")] = False,
    json: Json = False,
) -> None:
    """List the installed methods: category, paper, and what each can do."""
    with answered():
        from rich.console import Console

        import peftcore
        from peftcore.cli import listing
        from peftcore.contract import CATEGORIES

        if category is not None and category not in CATEGORIES:
            raise BadInput(f"no category {category!r}; there are: {', '.join(CATEGORIES)}")
        found = listing.records(peftcore.methods(category), sizes)
        if json:
            print(listing.as_json(found))
        else:
            Console().print(listing.as_table(found, sizes))
