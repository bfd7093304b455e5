"""The typer application, and helpers for its commands."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from peftcore.errors import BadInput, PeftcoreError
from peftcore.utils.packages import lab_is_missing

ORDER = (
    *("train", "compare", "search", "chat", "plan", "tree", "methods", "show", "schema"),
    *("inspect", "merge", "convert", "export-lora", "check", "export", "doctor", "new"),
)
"""The order in which commands are listed, which is the order in which users need them."""
OF_LAB = ("train", "compare", "search", "chat")
"""Commands of the distribution peftcore-lab; if it is not installed, they print how to install it."""
EXTRAS = {"transformers": "peftcore[cli]", "huggingface_hub": "peftcore[cli]", "jinja2": "peftcore[cli]"}
"""Packages that some commands import, but that the core does not require. Each has the name to pass to pip."""
KEPT = "\n\N{NO-BREAK SPACE}"
"""Characters that are printed although Python does not count them as printable."""


class Commands(TyperGroup):
    """The commands of the core and of plugins, in the order of `ORDER`, with all others last. Plugins are loaded only
    if the core does not have the called command, or if all commands are listed."""

    complete = False
    """True after the commands of plugins were added."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands."""
        self.complete_with_plugins()
        return sorted(super().list_commands(ctx), key=lambda name: (name not in ORDER, (*ORDER, name).index(name)))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command with this name, from the core or otherwise from a plugin."""
        if cmd_name not in self.commands:
            self.complete_with_plugins()
        return super().get_command(ctx, cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command at the start of a command line. If it is a command of peftcore-lab and that is not
        installed, print how to install it."""
        if args[0] in OF_LAB and self.get_command(ctx, args[0]) is None:
            with answered():
                raise lab_is_missing(f"peftcore {args[0]}")
        return super().resolve_command(ctx, args)

    def complete_with_plugins(self) -> None:
        """Add the commands of plugins, unless they were added already."""
        if not self.complete:
            from peftcore.cli.plugin_commands import commands

            self.complete = True
            self.commands.update(commands(taken=tuple(self.commands)))


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_show_locals=False)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Any value of the file: --set training.patience=3")]


@app.callback()
def root() -> None:
    """Parameter-efficient fine-tuning of any PyTorch model."""


def settings(given: list[str] | None, flag: str = "--set", example: str = "training.patience=3") -> dict[str, Any]:
    """Parse flags such as ``--set name=value``. Values are parsed as YAML: ``16``, ``true``, ``[1, 2]``, or a plain
    text.

    Raises:
        BadInput: one of them lacks a name, or a name occurs twice.
    """
    from peftcore.utils.yaml_values import parse

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
    """Return a text in which control characters are escaped, so that names from a file cannot contain escape sequences
    for the terminal."""
    return "".join(each if each.isprintable() or each in KEPT else repr(each)[1:-1] for each in str(text))


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """Context manager that prints errors of peftcore and errors about missing packages as one message, and exits with
    code 2. Other errors are bugs and keep their traceback."""
    try:
        yield
    except PeftcoreError as error:
        print(f"Error: {printable(error)}", file=sys.stderr)
        raise typer.Exit(2) from None
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        print(f"Error: not installed: {error.name}. Run: pip install '{EXTRAS[error.name]}'", file=sys.stderr)
        raise typer.Exit(2) from None
