"""The entry point of the command line: it looks for what the extra brings before it imports any command."""

from __future__ import annotations

import sys

from peftcore.comparing.errors import MissingPackage
from peftcore.comparing.packages import require
from peftcore.comparing.quiet import hush_imports

EXTRA = (
    *("typer", "rich", "yaml", "packaging", "psutil", "matplotlib"),
    *("transformers", "accelerate", "datasets", "tensorboard"),
)


def main() -> None:
    """Run the command line on ``sys.argv``. Exit code 0: all is well, 2: bad input, 1: an internal failure."""
    try:
        require(dict.fromkeys(EXTRA, "peftcore[cli]"))
    except MissingPackage as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    hush_imports()
    from peftcore.cli.commands import app

    app(prog_name="peftcore")
