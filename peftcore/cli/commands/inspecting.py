"""The commands ``peftcore plan`` and ``peftcore tree``: the changes that methods would make to a model. No weights are
loaded."""

from __future__ import annotations

from typing import Annotated

import typer

from peftcore.cli.app import Json, answered, app, settings
from peftcore.cli.commands._method_options import WithMethodOptions, for_methods
from peftcore.models.model_names import MODEL

Model = Annotated[str, typer.Argument(help=MODEL)]
Options = Annotated[list[str] | None, typer.Option("--option", metavar="NAME=VALUE", help="An option of the method.")]
Target = Annotated[
    list[str] | None, typer.Option(help="Target modules: a role, a glob, the end of a path. Repeatable.")
]
Exclude = Annotated[list[str] | None, typer.Option(help="Target modules to leave out. Repeatable.")]
Train = Annotated[list[str] | None, typer.Option(help="A module that is trained too, such as a head. Repeatable.")]
DType = Annotated[str | None, typer.Option(help="Data type of the weights; by default that of the config.")]


@app.command(cls=WithMethodOptions)
def plan(
    context: typer.Context,
    model: Model,
    method: Annotated[str, typer.Argument(help="A method; peftcore methods lists them.")],
    option: Options = None,
    target: Target = None,
    exclude: Exclude = None,
    train: Train = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples in a step.")] = 8,
    length: Annotated[int | None, typer.Option(min=1, help="Tokens of an example (128; of a prompt 77).")] = None,
    dtype: DType = None,
    checkpoint_gradients: Annotated[
        bool, typer.Option("--checkpoint-gradients", help="Let blocks run again in backward.")
    ] = False,
    shards: Annotated[
        int | None, typer.Option(min=1, help="Processes over which FSDP2 shards the weights; each has its own batch.")
    ] = None,
    resident: Annotated[int, typer.Option(min=1, help="Adapters that are on the model at once, to serve.")] = 1,
    json: Json = False,
) -> None:
    """Show the parameters that a method would train in a model, and the memory and operations of a step. Options of the
    method are flags too: --rank 8.

    The model is built from its configuration, without weights. A forward and a backward run on tensors without values,
    with the kernels of a CPU, to count the saved memory, the peak, and the operations of matrix products. Full
    fine-tuning is shown for comparison.
    """
    with answered():
        [flags] = for_methods(context, [{"name": method}])
        options = {**settings(option, "--option", "rank=16"), **flags}
        from peftcore.cli import pages
        from peftcore.cli.inspection import costs_page
        from peftcore.models.costs import costs
        from peftcore.models.dry_run import RequestedMethod
        from peftcore.models.example_inputs import Size

        wanted = RequestedMethod(method, options, target, exclude, train or ())
        found = costs(
            model,
            wanted,
            Size(batch_size, length),
            dtype,
            checkpointed=checkpoint_gradients,
            shards=shards,
            adapters=resident,
        )
        if json:
            print(pages.as_json(found.as_dict()))
        else:
            pages.console().print(costs_page.page(found))


@app.command()
def tree(
    model: Model,
    methods: Annotated[list[str] | None, typer.Argument(help="Methods whose changes are shown.")] = None,
    option: Options = None,
    target: Target = None,
    exclude: Exclude = None,
    json: Json = False,
) -> None:
    """Show the modules of a model with their roles, equal modules as one line, and the changes that methods would make.

    Options of methods, --target and --exclude apply to all methods.
    """
    with answered():
        options = settings(option, "--option", "rank=16")
        from peftcore.cli import pages
        from peftcore.cli.inspection import host_tree
        from peftcore.models.dry_run import RequestedMethod

        found = host_tree.shown(model, [RequestedMethod(method, options, target, exclude) for method in methods or ()])
        if json:
            print(pages.as_json(found.as_dict()))
        else:
            pages.console().print(found.page())
