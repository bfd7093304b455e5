"""The commands ``peftcore methods``, ``show``, ``schema`` and ``doctor``: information about the installed methods and
plugins."""

from __future__ import annotations

from typing import Annotated

import typer

from peftcore.cli.app import OF_LAB, Json, answered, app
from peftcore.errors import BadInput
from peftcore.utils.packages import lab_is_missing


@app.command()
def methods(
    category: Annotated[str | None, typer.Option(help="Category of the methods to list.")] = None,
    sizes: Annotated[
        bool, typer.Option("--sizes", help="Also count the trainable parameters of each in known models.")
    ] = False,
    json: Json = False,
) -> None:
    """List the installed methods: category, paper, and the abilities of each."""
    with answered():
        from rich.console import Console

        import peftcore
        from peftcore.cli.inspection import methods_table
        from peftcore.contract.method import CATEGORIES

        if category is not None and category not in CATEGORIES:
            raise BadInput(f"no category {category!r}; there are: {', '.join(CATEGORIES)}")
        found = methods_table.records(peftcore.methods(category, presets=True), sizes)
        if json:
            print(methods_table.as_json(found))
        else:
            Console().print(methods_table.as_table(found, sizes))
            Console().print(methods_table.tally(found))


@app.command()
def show(
    method: Annotated[str, typer.Argument(help="A method; plugin/method where two plugins have one.")],
    json: Json = False,
) -> None:
    """Describe a method: equation, paper, options, abilities, and trainable parameters in known models."""
    with answered():
        from peftcore.cli import pages
        from peftcore.cli.inspection.show import MethodDescription

        found = MethodDescription.of(method)
        if json:
            print(pages.as_json(found.as_dict()))
        else:
            pages.console().print(found.page())


@app.command()
def schema(
    what: Annotated[
        str | None,
        typer.Argument(help="A command with a file, such as train; or a method; all methods, if left out."),
    ] = None,
) -> None:
    """Print the JSON schema of a file that a command reads, of a method's options, or of the options of all methods."""
    with answered():
        from peftcore.cli import pages
        from peftcore.registry import catalogue
        from peftcore.registry.plugins import imported, named_places

        files = named_places("peftcore_file_schemas", "the schema of")
        if what in OF_LAB and what not in files:
            raise lab_is_missing(f"the file of peftcore {what}")
        print(pages.as_json(imported(files[what])() if what in files else catalogue.schema(what)))


@app.command()
def doctor(json: Json = False) -> None:
    """Report installed and broken parts: plugins, versions, extras, quantization schemes, devices.

    Exit code 0: no problems. 1: no methods are installed, a plugin or a method is broken, or a name means several
    methods.
    """
    with answered():
        from peftcore.cli import pages
        from peftcore.cli.inspection.doctor import examine, page

        found = examine()
        if json:
            print(pages.as_json(found.as_dict()))
        else:
            pages.console().print(page(found))
    raise typer.Exit(0 if found.healthy else 1)
