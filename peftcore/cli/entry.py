"""The entry point of the command line."""

from __future__ import annotations

from peftcore.utils.quiet import hush_imports


def main() -> None:
    """Run the command line on ``sys.argv``. Exit code 0: all is well, 2: bad input, 1: an internal failure."""
    hush_imports()
    from peftcore.cli.commands import app

    app(prog_name="peftcore")
