"""``peftcore compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftcore.cli.app import Json, answered, app
from peftcore.cli.data import Task, read_task
from peftcore.cli.demo import MAX_LENGTH, RECIPES, model_folder, tweets
from peftcore.cli.errors import BadInput

ALL = ",".join(RECIPES)

Demo = Annotated[bool, typer.Option("--demo", help="A MiniLM encoder on tweets, both from Python packages.")]
Model = Annotated[Path | None, typer.Option(help="Folder of a transformers model: config, weights, tokenizer.")]
Data = Annotated[Path | None, typer.Option(help="CSV or JSONL file of labelled texts.")]
Methods = Annotated[str, typer.Option(help="Names, separated by commas; 'full' is full fine-tuning.")]
TextColumn = Annotated[str | None, typer.Option(help="Column of the texts; guessed when left out.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column of the labels; guessed when left out.")]
Steps = Annotated[int, typer.Option(min=1, help="Optimizer steps for each method.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Texts in a step.")]
MaxLength = Annotated[int | None, typer.Option(min=4, help="Tokens kept of a text (128; in the demo 40).")]
EvalSize = Annotated[int | None, typer.Option(min=1, help="Texts held out (a fifth, at most 1000).")]
Seed = Annotated[int, typer.Option(min=0, help="Of the head, the adapters, the batches and dropout.")]
LearningRate = Annotated[
    float | None, typer.Option(help="One learning rate for all, instead of those that suit the demo.")
]
Out = Annotated[Path, typer.Option(help="Folder for results.json, results.png and adapters/.")]
Tuning = Annotated[bool, typer.Option("--tuning", help="Demo: score the split that is there to choose settings by.")]


@app.command()
def compare(
    demo: Demo = False,
    model: Model = None,
    data: Data = None,
    methods: Methods = ALL,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    steps: Steps = 100,
    batch_size: BatchSize = 32,
    max_length: MaxLength = None,
    eval_size: EvalSize = None,
    seed: Seed = 0,
    lr: LearningRate = None,
    out: Out = Path("peftcore-compare"),
    tuning: Tuning = False,
    json: Json = False,
) -> None:
    """Fine-tune one model with several methods, and compare what each costs and gains."""
    with answered():
        if lr is not None and not lr > 0:
            raise BadInput(f"--lr must be above 0, got {lr}")
        if demo:
            refuse_with_demo(
                model=model, data=data, eval_size=eval_size, text_column=text_column, label_column=label_column
            )
            folder, task = model_folder(), tweets(tuning)
        else:
            folder, task = own_task(model, data, text_column, label_column, eval_size, tuning)
        # Not before the input has been read: what follows imports torch and transformers.
        from rich.console import Console

        from peftcore.cli.compare import Job, choose_methods, run_all
        from peftcore.cli.progress import Bars
        from peftcore.cli.training import Schedule

        job = Job(
            model=folder,
            task=task,
            methods=choose_methods(methods),
            out=out,
            schedule=Schedule(steps, batch_size, seed),
            max_length=max_length or (MAX_LENGTH if demo else 128),
            learning_rate=lr,
        )
        with Bars(Console(stderr=True), len(job.methods)) as bars:
            report = run_all(job, bars)
        if json:
            print(report.as_json())
        else:
            Console().print(report.table())
            print(f"{out}: results.json, results.png, adapters/")


def refuse_with_demo(**options: object) -> None:
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    if given:
        raise BadInput(f"--demo brings its own model and data; leave out {', '.join(given)}")


def own_task(
    model: Path | None,
    data: Path | None,
    text_column: str | None,
    label_column: str | None,
    eval_size: int | None,
    tuning: bool,
) -> tuple[Path, Task]:
    """The user's model folder and data."""
    if tuning:
        raise BadInput("--tuning belongs to --demo")
    if model is None or data is None:
        raise BadInput("give --demo, or both --model and --data")
    return model, read_task(data, text_column, label_column, eval_size)
