"""The commands ``peftcore check`` and ``peftcore export``, for programs that read adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftcore.cli.app import Json, app
from peftcore.cli.commands._adapter_options import Adapter, Component, ModelClass, Overwrite, at_work, output_of
from peftcore.models.model_names import MODEL, find

READER = "peft, vllm, sglang, tgi, llama.cpp, mlx-lm, diffusers or comfyui."


@app.command()
def check(
    adapter: Adapter,
    reader: Annotated[str, typer.Option("--for", help=f"The program that is to read it: {READER}")],
    json: Json = False,
) -> None:
    """Report which parts of an adapter's file another program would read, change, drop or refuse, without a model.

    Exit code 0: the program reads the whole file as it was trained. 1: it does not.
    """
    with at_work():
        from rich.console import Console

        from peftcore.cli.adapters import adapter_tables
        from peftcore.files.readers.check import check as checked
        from peftcore.files.readers.reader import reader_named

        report = checked(adapter, reader_named(reader))
        if json:
            print(adapter_tables.as_json(adapter_tables.report_data(report)))
        else:
            adapter_tables.show_report(report, Console())
    raise typer.Exit(0 if report.as_trained else 1)


@app.command()
def export(
    adapter: Adapter,
    out: Annotated[Path, typer.Argument(help="Folder to write, or FILE.safetensors for a format of one file.")],
    reader: Annotated[str, typer.Option("--for", help=f"The program that is to read it: {READER}")],
    model: Annotated[str | None, typer.Option(help=f"{MODEL} By default that which the adapter names.")] = None,
    project: Annotated[
        int | None,
        typer.Option(min=1, help="Where nothing that the program reads is equal: the nearest LoRA, of this rank."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="A text file, an example a line: nearest in outputs for these, not in weights.")
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(min=0, help="Write nothing if a target module loses more of its update.")
    ] = None,
    component: Component = None,
    model_class: ModelClass = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write an adapter of any method in a form that another program reads as it was trained: unchanged, as a LoRA that
    computes the same, or with --project as the nearest LoRA, with its error. Anything else is refused.

    Only the model's configuration is read; its weights are loaded if another method is converted to a LoRA.
    """
    with at_work() as display:
        from rich.console import Console

        from peftcore.cli.adapters import adapter_tables, jobs
        from peftcore.cli.adapters.adapter_hosts import ModelOptions, base_of
        from peftcore.files.readers.reader import reader_named

        found, read = reader_named(reader), jobs.read(adapter)
        wanted = ModelOptions(base_of(read) if model is None else find(model), component, model_class)
        output = output_of(out, overwrite, [*wanted.model.local(), Path(adapter)])
        with display() as line:
            done = jobs.export(wanted, read, found, output, jobs.NearestLoraOptions(project, data, max_error), line)
        if json:
            print(adapter_tables.as_json(adapter_tables.export_data(done)))
        else:
            adapter_tables.show_export(done, Console())
