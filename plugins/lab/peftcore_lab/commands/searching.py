"""The command ``peftcore search``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from peftcore.cli.app import Json, Set, answered, settings
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

Config = Annotated[Path | None, typer.Argument(help="YAML file of the search; the options below override it.")]
Methods = Annotated[str | None, typer.Option(help="Names, separated by commas; a file can set the options of each.")]
Budget = Annotated[
    str | None, typer.Option(help="Maximum number of trainable parameters: 50k, 1.5M, or a share of the model: 0.5%.")
]
Memory = Annotated[str | None, typer.Option(help="Maximum memory of a training step: 2GB.")]
Trials = Annotated[int | None, typer.Option(help="Runs on the tuning split, of all workers together (20).")]
Seeds = Annotated[
    str | None, typer.Option(help="Seeds of the runs among which the pick is chosen, and of the final runs: 0,1,2.")
]
Seed = Annotated[int | None, typer.Option(help="Random seed of the search and of its runs (0).")]
Storage = Annotated[str | None, typer.Option(help="Storage of the study: a journal file, or sqlite:///study.db.")]
Study = Annotated[str | None, typer.Option(help="Name of the study in the storage.")]
Worker = Annotated[bool, typer.Option("--worker", help="Only run trials, for a search that another process finishes.")]
Out = Annotated[Path | None, typer.Option(help="Folder for the results and the runs.")]


Together = Annotated[int | None, typer.Option(help="How many trials train at once on one model (4).")]


def search(
    config: Config = None,
    demo: Demo = False,
    model: Model = None,
    task: Task = None,
    data: Data = None,
    methods: Methods = None,
    budget: Budget = None,
    memory: Memory = None,
    trials: Trials = None,
    together: Together = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    seeds: Seeds = None,
    seed: Seed = None,
    storage: Storage = None,
    study: Study = None,
    worker: Worker = False,
    out: Out = None,
    set_: Set = None,
    on: On = None,
    address: Address = None,
    json: Json = False,
) -> None:
    """Find the method, its options and its target modules that suit a task best within a budget."""
    flags = {
        "model": model,
        "task": task,
        "data.train": data,
        "methods": methods,
        "budget": budget,
        "memory": memory,
        "trials": trials,
        "training.steps": steps,
        "training.batch_size": batch_size,
        "seeds": None if seeds is None else seeds.split(","),
        "seed": seed,
        "storage": storage,
        "study": study,
        "together": together,
        "out": out,
    }
    with answered():
        from peftcore_lab.comparisons import demo as tweets
        from peftcore_lab.runs import reading

        place = place_of(on, address)
        values: dict[str, Any] = {} if config is None else reading.load(config)
        check_source(demo, config, model, task, data)
        if demo:
            values = tweets.searching(out or Path("peftcore-search"), methods)
        if worker and storage is None and "storage" not in values:
            raise BadInput("--worker needs --storage: the study that the workers share")
        # Not before the input has been read: what follows imports torch and transformers.
        from rich.console import Console

        from peftcore.cli import pages
        from peftcore.cli.progress_display import Bars
        from peftcore_lab.printing import comparison_table
        from peftcore_lab.printing import search_table as searched
        from peftcore_lab.searching import search as job

        where = str(config or "the options")
        what = reading.read(job.Search, values, [*given(flags), *settings(set_).items()], where)
        with Bars(Console(stderr=True), what.runs) as bars:
            if worker:
                count = job.work(what, bars)
            elif place is not None:
                from peftcore_lab.searching.search_on_ray import search_on_ray

                found = search_on_ray(what, bars, place)
            else:
                found = job.search(what, bars)
        if worker and json:
            print(pages.as_json({"trials": count, "of": what.trials, "storage": what.storage}))
        elif worker:
            print(f"{count} of {what.trials} trials in {what.storage}")
        elif json:
            print(found.as_json(), end="")
        else:
            console = Console()
            console.print(searched.table(found))
            console.print(comparison_table.table(found.report))
            print(f"{what.out}: best.yaml, search.json, report.html, results.json, results.png, runs/, search/")
