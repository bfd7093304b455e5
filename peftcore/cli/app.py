"""The typer application, and what its commands have in common."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from peftcore.errors import PeftcoreError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_show_locals=False)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.callback()
def root() -> None:
    """Parameter-efficient fine-tuning of any PyTorch model."""


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """What peftcore refuses becomes one message and exit code 2; anything else is our fault and keeps its traceback."""
    try:
        yield
    except PeftcoreError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
