"""The command ``peftcore compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from peftcore.cli.app import Json, Set, answered, settings
from peftcore.cli.commands._method_options import for_methods
from peftcore.errors import BadInput
from peftcore_lab.commands._options import (
    Address,
    BatchSize,
    Data,
    Demo,
    Model,
    On,
    Steps,
    Task,
    check_source,
    given,
    place_of,
)

Config = Annotated[Path | None, typer.Argument(help="YAML file of the comparison; the options below override it.")]
Methods = Annotated[str | None, typer.Option(help="Names, separated by commas; 'full' is full fine-tuning.")]
LearningRate = Annotated[
    float | None, typer.Option("--lr", help="Learning rate of all methods (1e-3; in the demo, one that suits each).")
]
TuneRates = Annotated[
    str | None,
    typer.Option("--tune-lr", help="Try each method with these rates on a tuning set first: 3e-4,1e-3,3e-3."),
]
Seeds = Annotated[str | None, typer.Option(help="Seeds; each method is trained once with each: 0,1,2 (0).")]
Out = Annotated[Path | None, typer.Option(help="Folder for the report and the runs.")]
Tuning = Annotated[
    bool, typer.Option("--tuning", help="Demo: score on the tuning split, which is for choosing settings.")
]


Resume = Annotated[
    bool,
    typer.Option("--resume", help="Keep the finished runs in the folder, and resume the unfinished ones."),
]
Together = Annotated[int | None, typer.Option(help="How many runs train at once on one model (1).")]


def compare(
    context: typer.Context,
    config: Config = None,
    demo: Demo = False,
    model: Model = None,
    task: Task = None,
    data: Data = None,
    methods: Methods = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    tune_lr: TuneRates = None,
    together: Together = None,
    seeds: Seeds = None,
    out: Out = None,
    set_: Set = None,
    tuning: Tuning = False,
    resume: Resume = False,
    on: On = None,
    address: Address = None,
    json: Json = False,
) -> None:
    """Fine-tune one model with several methods, and compare what each costs and gains.

    Each option of a method is a flag too, of all those that have it: --rank 8.
    """
    flags = {
        "model": model,
        "task": task,
        "data.train": data,
        "training.steps": steps,
        "training.batch_size": batch_size,
        "training.learning_rate": lr,
        "tune_lr": tune_lr,
        "together": together,
        "out": out,
        "seeds": None if seeds is None else seeds.split(","),
    }
    with answered():
        from peftcore_lab.comparisons import demo as tweets
        from peftcore_lab.runs import reading

        values: dict[str, Any] = {} if config is None else reading.load(config)
        if lr is not None and tune_lr is not None:
            raise BadInput(
                "--lr sets one rate for all methods and --tune-lr chooses one for each: use only one of them"
            )
        if tuning and not demo:
            raise BadInput("--tuning works only with --demo: add --demo, or remove --tuning")
        check_source(demo, config, model, task, data)
        if demo:
            values = tweets.comparison(out or Path("peftcore-compare"), tuning)
        values.setdefault("task", "text-classification")
        if methods is not None or "methods" not in values:
            names = tweets.listed(methods or ",".join(tweets.RECIPES))
            # What suits tweets suits nothing else; what is tuned has no rate yet.
            values["methods"] = tweets.candidates(names, lr, tune_lr is not None) if demo else names
        # Not before the input has been read: what follows imports torch and transformers.
        from rich.console import Console

        from peftcore.cli.progress_display import Bars
        from peftcore_lab.comparisons.compare import compare as work
        from peftcore_lab.comparisons.comparison import Comparison
        from peftcore_lab.printing.comparison_table import table

        where = str(config or "the options")
        values = reading.changed(values, [*given(flags), *settings(set_).items()])
        comparison = reading.validated(Comparison, _with_options(context, values), where)
        with Bars(Console(stderr=True), comparison.runs) as bars:
            report = work(comparison, bars, resume, place_of(on, address))
        if json:
            print(report.as_json(), end="")
        else:
            Console().print(table(report))
            print(f"{comparison.out}: report.html, results.json, .csv, .md, .tex, .png, runs/")


def _with_options(context: typer.Context, values: dict[str, Any]) -> dict[str, Any]:
    """Return the values, in which each method has those command-line flags that are options of the method."""
    listed = values.get("methods")
    listed = listed.split(",") if isinstance(listed, str) else listed
    if not isinstance(listed, list):
        return values
    from peftcore_lab.runs.run import FULL

    whole = [each if isinstance(each, dict) else {"name": str(each).strip()} for each in listed]
    options = for_methods(context, whole, (FULL,))
    return {**values, "methods": [held | own for held, own in zip(whole, options, strict=True)]}
