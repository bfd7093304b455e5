"""The entry point of the command line."""

from __future__ import annotations

from peftcore.utils.quiet import hush_imports


def main() -> None:
    """Run the command line with the arguments in ``sys.argv``. Exit codes: 0 for success, 2 for bad input, 1 for an
    internal failure."""
    hush_imports()
    from peftcore.cli.commands import app

    app(prog_name="peftcore")
