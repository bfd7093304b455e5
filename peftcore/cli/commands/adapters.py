"""The commands on adapter files: ``peftcore inspect``, ``merge``, ``convert``, ``export-lora``."""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from peftcore.cli.app import Json, app
from peftcore.cli.commands._adapter_options import Adapter, Component, ModelClass, Overwrite, at_work, output_of
from peftcore.errors import BadInput
from peftcore.models.model_names import MODEL, Use, find


class Into(StrEnum):
    """The form of quantized weights after a merge."""

    float = "float"
    same = "same"


Model = Annotated[str, typer.Argument(help=MODEL)]
OutFolder = Annotated[Path, typer.Option("--out", help="Folder to write.")]


@app.command()
def inspect(adapter: Adapter, json: Json = False) -> None:
    """Describe an adapter file, without any model: format, method, options, base model, target modules, tensors."""
    with at_work():
        from rich.console import Console

        from peftcore.cli.adapters import adapter_tables
        from peftcore.files.save_load import describe

        about = describe(adapter)
        if json:
            print(adapter_tables.as_json(adapter_tables.description_data(about)))
        else:
            adapter_tables.show_description(about, Console())


@app.command()
def merge(
    model: Model,
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER", help="Adapters, merged in this order.")],
    out: OutFolder,
    into: Annotated[
        Into, typer.Option(help="What a quantized model becomes: a floating point one, or quantized as it was.")
    ] = Into.float,
    weights: Annotated[
        str | None, typer.Option(help="A weight for each adapter, separated by commas: 0.7,0.3.")
    ] = None,
    max_error: Annotated[
        float, typer.Option(min=0, help="Refuse if quantizing a weight again moves it by more.")
    ] = 0.25,
    component: Component = None,
    model_class: ModelClass = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Merge adapters into a model and write it, with its tokenizer, so that it loads without peftcore."""
    with at_work() as display:
        shares = _weights(weights, len(adapters))
        named = find(model)
        named.check(Use.MERGE)
        output = output_of(out, overwrite, [*named.local(), *map(Path, adapters)])
        from rich.console import Console

        from peftcore.cli.adapters import adapter_tables, jobs
        from peftcore.cli.adapters.adapter_hosts import ModelOptions

        wanted = ModelOptions(named, component, model_class)
        read = [jobs.read(each) for each in adapters]
        with display() as line:
            merged = jobs.merge(wanted, read, output, shares, into.value, max_error, line)
        if json:
            print(adapter_tables.as_json(adapter_tables.merged_data(model, out, merged)))
        else:
            adapter_tables.show_merged(out, merged, Console())


@app.command()
def convert(
    adapter: Adapter,
    to: Annotated[
        str, typer.Option(help="native, peft, diffusers, kohya, mlx or gguf; diffusers/text_encoder_2 names a part.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write, or FILE.safetensors for a format of one file.")],
    model: Annotated[str | None, typer.Option(help=f"{MODEL} By default that which the adapter names.")] = None,
    component: Component = None,
    model_class: ModelClass = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write an adapter in another format.

    Only the model's configuration is read; its weights are loaded if the conversion depends on them.
    """
    with at_work() as display:
        from rich.console import Console

        from peftcore.cli.adapters import adapter_tables, jobs
        from peftcore.cli.adapters.adapter_hosts import ModelOptions, base_of

        format = _format(to)
        read = jobs.read(adapter)
        wanted = ModelOptions(base_of(read) if model is None else find(model), component, model_class)
        output = output_of(out, overwrite, [*wanted.model.local(), Path(adapter)])
        with display() as line:
            done = jobs.convert(wanted, read, format, output, line)
        if json:
            print(adapter_tables.as_json(adapter_tables.converted_data(done)))
        else:
            adapter_tables.show_converted(done, Console())


@app.command()
def export_lora(
    model: Model,
    adapter: Adapter,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the LoRA.")],
    out: Annotated[Path, typer.Option(help="Folder to write, or FILE.safetensors for a format of one file.")],
    format: Annotated[str, typer.Option(help="native, peft, diffusers or kohya.")] = "peft",
    max_error: Annotated[
        float | None,
        typer.Option(min=0, help="Write nothing if a target module loses more of its update: 0.05 is 5 percent."),
    ] = None,
    component: Component = None,
    model_class: ModelClass = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write the LoRA that is nearest to the weight change of an adapter of any method, and report its error."""
    with at_work() as display:
        to = _format(format)
        named = find(model)
        output = output_of(out, overwrite, [*named.local(), Path(adapter)])
        from rich.console import Console

        from peftcore.cli.adapters import adapter_tables, jobs
        from peftcore.cli.adapters.adapter_hosts import ModelOptions

        read = jobs.read(adapter)
        with display() as line:
            injection = jobs.load_whole(ModelOptions(named, component, model_class), read, line)
        done = jobs.export_lora(injection, read, rank, to, output, max_error)  # which has a bar of its own
        if json:
            print(adapter_tables.as_json(adapter_tables.exported_data(done)))
        else:
            adapter_tables.show_exported(done, Console())


def _format(name: str) -> str:
    """Return the name of a format as `Injection.save` accepts it."""
    from peftcore.cli.adapters.results import NATIVE, OURS, shown_format
    from peftcore.files.formats.format import format_named, formats

    found = OURS if name == NATIVE else name
    if found.partition("/")[0] not in formats():
        raise BadInput(f"there is no format {name!r}; there are: {', '.join(map(shown_format, formats()))}")
    format_named(found)
    return found


def _weights(text: str | None, count: int) -> list[float]:
    """Return one weight for each adapter, parsed from `text`; 1 for each if `text` is None."""
    if text is None:
        return [1.0] * count
    try:
        found = [float(each) for each in text.split(",")]
    except ValueError:
        raise BadInput(f"--weights {text}: numbers separated by commas, such as 0.7,0.3") from None
    if len(found) != count or not all(map(math.isfinite, found)):
        raise BadInput(f"--weights {text}: {count} finite numbers are needed, one for each adapter")
    return found
