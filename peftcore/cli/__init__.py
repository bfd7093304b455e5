"""The command line ``peftcore``: a typer application to which each command module adds itself.

Its dependencies belong to the extra ``peftcore[cli]`` and are imported when a command runs: ``import peftcore`` stays
light, and an installation without the extra says what to install instead of failing at import.
"""

from __future__ import annotations

import sys

from peftcore.cli.errors import MissingPackage, require

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
    from peftcore.cli.commands import app

    app(prog_name="peftcore")
