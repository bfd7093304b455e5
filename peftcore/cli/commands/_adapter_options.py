"""Options and error output that the commands on adapter files share."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from peftcore.cli.app import answered, printable

Adapter = Annotated[str, typer.Argument(help="Folder or file of an adapter, in any format that peftcore loads.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result.")]
ModelClass = Annotated[str | None, typer.Option(help="Class of transformers, if the folder has no head.")]
Component = Annotated[str | None, typer.Option(help="Which model of a pipeline; not needed if only one fits.")]


@contextmanager
def at_work() -> Iterator[Any]:
    """Context manager that prints an error as one message, and each warning as one line. It yields a function that
    creates the progress display."""

    def told(message: Warning | str, *place: Any, **more: Any) -> None:
        print(f"Warning: {printable(message)}", file=sys.stderr)

    def display() -> Any:
        from rich.console import Console

        from peftcore.cli.progress_display import BarDisplay
        from peftcore.utils.quiet import no_bars

        no_bars()
        return BarDisplay(Console(stderr=True))

    with answered(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module="peftcore")
        warnings.showwarning = told
        yield display


def output_of(out: Path, overwrite: bool, sources: Sequence[Path]) -> Any:
    from peftcore.cli.adapters.output import AdapterOutput

    return AdapterOutput(out, overwrite, sources)
