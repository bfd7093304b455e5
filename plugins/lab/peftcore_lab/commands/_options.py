"""Options that the commands for training, comparing and searching share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from peftcore.errors import BadInput
from peftcore.models.model_names import MODEL

Demo = Annotated[bool, typer.Option("--demo", help="A MiniLM encoder on tweets, both from Python packages.")]
Model = Annotated[str | None, typer.Option(help=MODEL)]
Task = Annotated[str | None, typer.Option(help="The task: text-classification, causal-lm, chat ...")]
Data = Annotated[str | None, typer.Option(help="The examples: a table, a folder, a dataset's name.")]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps of a run.")]
On = Annotated[
    str | None, typer.Option("--on", help="Where to run: ray. By default on this machine, one run after the other.")
]
Address = Annotated[
    str | None, typer.Option(help="Address of a Ray cluster: 10.0.0.1:6379. By default a new one on this machine.")
]
BatchSize = Annotated[int | None, typer.Option(help="Examples in a batch.")]


def given(flags: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the flags that the user set, by their names in a configuration file."""
    return [(name, value) for name, value in flags.items() if value is not None]


def check_source(demo: bool, config: object, model: str | None, task: str | None, data: str | None) -> None:
    """Check that the examples and the model are named, either by the demonstration, or by a file or flags.

    Raises:
        BadInput: they are not named, or the demonstration is combined with a file or flags.
    """
    if demo and (config or model or data or task):
        raise BadInput(
            "--demo has its own model, task and data: remove --model, --task, --data and the configuration file"
        )
    if not demo and config is None and (model is None or data is None):
        raise BadInput("set --demo, name a configuration file, or set both --model and --data")


def place_of(on: str | None, address: str | None) -> Any:
    """Return the object that executes runs: a Ray cluster, or None for this process.

    Raises:
        BadInput: `on` is not "ray", or an address is set without it.
    """
    if on is None:
        if address is not None:
            raise BadInput("--address is the address of a Ray cluster: add --on ray")
        return None
    if on != "ray":
        raise BadInput(f"--on {on} is unknown: use --on ray")
    from peftcore_lab.comparisons.comparison_on_ray import OnRay

    return OnRay(address)
