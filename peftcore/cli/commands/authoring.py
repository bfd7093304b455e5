"""The command ``peftcore new``: a plugin to start from."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from peftcore.cli.app import answered, app
from peftcore.errors import BadInput


class Template(StrEnum):
    """The kind of a plugin."""

    method = "method"
    quantizer = "quantizer"


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Name of the method or the format: my-method.")],
    folder: Annotated[Path | None, typer.Option(help="Where to write it (peftcore-NAME).")] = None,
    template: Annotated[Template, typer.Option(help="A method, or a quantization scheme.")] = Template.method,
    category: Annotated[str | None, typer.Option(help="Category of a method; peftcore methods shows them.")] = None,
    activations: Annotated[
        bool | None, typer.Option("--activations/--weights", help="What a method changes (weights).")
    ] = None,
) -> None:
    """Write a plugin package for a new method, which can be installed and passes the conformance kit as it is."""
    with answered():
        from peftcore.utils.packages import require

        require({"jinja2": "peftcore[cli]"})
        from peftcore.cli import pages
        from peftcore.cli.authoring import new as job
        from peftcore.contract.method import CATEGORIES

        if template is Template.quantizer and (category is not None or activations is not None):
            raise BadInput("--category, --activations and --weights are for methods; remove them for a quantizer")
        if category is not None and category not in CATEGORIES:
            raise BadInput(f"no category {category!r}; there are: {', '.join(CATEGORIES)}")
        usual = "additive" if activations else "reparameterized"
        plugin = job.NewPlugin(name, template.value, bool(activations), category or usual)
        pages.console().print(job.write(plugin, folder or Path(plugin.distribution)))
