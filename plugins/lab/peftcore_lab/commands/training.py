"""The command ``peftcore train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftcore.cli.app import Json, Set, answered, settings
from peftcore.cli.commands._method_options import for_methods
from peftcore.errors import BadInput
from peftcore_lab.commands._options import Address, BatchSize, Data, Model, On, Steps, Task, given, place_of

Config = Annotated[Path | None, typer.Argument(help="YAML file of the run; the options below override it.")]
Method = Annotated[str | None, typer.Option(help="Name of a method. Each of its options is a flag too: --rank 8.")]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Learning rate.")]
Seed = Annotated[int | None, typer.Option(help="Random seed.")]
Out = Annotated[Path | None, typer.Option(help="Folder for the adapter, checkpoints, logs and metrics.")]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Resume the run in the folder from its last checkpoint; more steps are allowed."),
]
Adapter = Annotated[str | None, typer.Option(help="An adapter to continue, instead of a new one of a method.")]
Processes = Annotated[int, typer.Option(min=1, help="With --on ray: how many processes train together (1).")]


def train(
    context: typer.Context,
    config: Config = None,
    model: Model = None,
    task: Task = None,
    data: Data = None,
    method: Method = None,
    adapter: Adapter = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    seed: Seed = None,
    out: Out = None,
    set_: Set = None,
    resume: Resume = False,
    on: On = None,
    address: Address = None,
    processes: Processes = 1,
    json: Json = False,
) -> None:
    """Train one method on one task, from a model and a file to an adapter."""
    flags = {
        "model": model,
        "task": task,
        "data.train": data,
        "method": method,
        "adapter": adapter,
        "training.steps": steps,
        "training.batch_size": batch_size,
        "training.learning_rate": lr,
        "training.seed": seed,
        "out": out,
    }
    with answered():
        from peftcore_lab.runs import reading
        from peftcore_lab.runs.run import FULL, Run

        values = {} if config is None else reading.load(config)
        values = reading.changed(values, [*given(flags), *settings(set_).items()])
        held = values.get("method", {})
        [options] = for_methods(context, [held if isinstance(held, dict) else {"name": held}], (FULL,))
        where = str(config or "the options")
        run = reading.read(Run, values, [(f"method.{name}", value) for name, value in options.items()], where)
        # Not before the input has been read: what follows imports torch and transformers.
        from rich.console import Console

        from peftcore.cli.progress_display import BarDisplay
        from peftcore.utils.quiet import no_bars
        from peftcore_lab.printing.run_output import show
        from peftcore_lab.runs.folder import first_process
        from peftcore_lab.training import train as job

        no_bars()
        place = place_of(on, address)
        if processes != 1 and place is None:
            raise BadInput(
                "--processes needs --on ray; without Ray, start several processes on one machine with torchrun"
            )
        others = not first_process()  # of several processes, one speaks
        with BarDisplay(Console(stderr=True, quiet=others)) as line:
            if place is None:
                outcome = job.train(run, line, resume)
            else:
                line.phase(f"{processes} on Ray", None)
                outcome = place.train(run, processes, resume)
        if json and not others:
            print(job.as_json(outcome), end="")
        elif not json:
            show(outcome, Console(quiet=others))
