"""The typer application, and helpers of its commands."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from peftcore.comparing.errors import BadInput
from peftcore.errors import PeftcoreError

ORDER = (
    *("train", "compare", "search", "chat", "plan", "tree", "methods", "show", "schema"),
    *("inspect", "merge", "convert", "export-lora", "check", "export", "doctor", "new"),
)
"""Commands in the order in which people need them."""
KEPT = "\n\N{NO-BREAK SPACE}"
"""Characters that a terminal may be shown, though Python does not count them as printable."""


class Commands(TyperGroup):
    """The commands in that order; others come last."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return their names."""
        return sorted(super().list_commands(ctx), key=lambda name: (name not in ORDER, (*ORDER, name).index(name)))


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_show_locals=False)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Any value of the file: --set training.patience=3")]


@app.callback()
def root() -> None:
    """Parameter-efficient fine-tuning of any PyTorch model."""


def settings(given: list[str] | None, flag: str = "--set", example: str = "training.patience=3") -> dict[str, Any]:
    """Parse ``--set name=value``, its values read as YAML: ``16``, ``true``, ``[1, 2]``, or a text as it stands.

    Raises:
        BadInput: one of them has no name, or a name is given twice.
    """
    from peftcore.comparing.runs.reading import parse

    found: dict[str, Any] = {}
    for each in given or ():
        name, equals, value = each.partition("=")
        name = name.strip()
        if not equals or not name:
            raise BadInput(f"{flag} {each}: write it as NAME=VALUE, such as {example}")
        if name in found:
            raise BadInput(f"{flag} {name} is given twice")
        found[name] = parse(value, f"{flag} {name}")
    return found


def printable(text: object) -> str:
    """Return a text in which a file's names may be, with what a terminal would obey, such as escapes, spelled out."""
    return "".join(each if each.isprintable() or each in KEPT else repr(each)[1:-1] for each in str(text))


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """Turn what peftcore refuses into one message and exit code 2; anything else is our fault and keeps its
    traceback."""
    try:
        yield
    except PeftcoreError as error:
        print(f"Error: {printable(error)}", file=sys.stderr)
        raise typer.Exit(2) from None
