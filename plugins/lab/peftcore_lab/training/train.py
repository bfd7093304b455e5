"""Executes a run: trains one method on one task with the ``Trainer`` of transformers, and saves the adapter.

All files are in one folder: ``adapter/`` (or ``model/`` in full fine-tuning), ``checkpoints/``, ``logs/`` for
TensorBoard, ``metrics.json``, and ``run.json``, with which ``--resume`` checks that the run is the same.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader, Subset

import peftcore
from peftcore.errors import BadInput, TrainingError
from peftcore.files.safe_io import write_text
from peftcore.layers.fsdp import hold_whole, is_sharded
from peftcore.utils.packages import require
from peftcore_lab.runs.folder import Keeper, RunFolder, first_process, plain
from peftcore_lab.runs.reading import validated
from peftcore_lab.runs.run import FULL, Run
from peftcore_lab.tasks import task_catalogue
from peftcore_lab.tasks.task import Prepared
from peftcore_lab.training.advice import advice
from peftcore_lab.training.memory import is_full
from peftcore_lab.training.run_trainer import AdapterTrainer, Clock, trainer_for
from peftcore_lab.training.task_rows import check_known, options_for, without_names

LOOKED_AT = 16
"""Number of batches for methods that need data before training."""


class RunDisplay(Protocol):
    """A display of a run's progress."""

    def phase(self, name: str, total: int | None) -> None:
        """Begin a phase with the given number of steps; None if the number is unknown."""

    def advance(self) -> None:
        """Display that one step is done."""

    def say(self, line: str) -> None:
        """Print a line that remains on the screen."""


@dataclass(frozen=True)
class Outcome:
    """The result of a run."""

    method: str
    trainable: int
    total: int
    before: dict[str, float]
    after: dict[str, float]
    """Scores of the best checkpoint, or after the last step if no best checkpoint is kept."""
    curve: list[tuple[int, float]]
    """Pairs of a step and the task's metric at that step."""
    losses: list[tuple[int, float]]
    """Pairs of a step and the mean training loss since the previous pair."""
    steps: int
    seconds: float
    seconds_per_step: float
    saved: str
    """Folder of the adapter."""
    train_size: int
    held_out_size: int
    floor: float | None
    """The majority baseline, if it is known: the metric of a constant answer."""
    samples: list[tuple[str, str]]
    """Answers of the model before training and after it."""
    picture: str = ""
    """A file that shows all samples, if they are pictures."""


class DisplayCallback(transformers.TrainerCallback):
    """A callback that reports to the display."""

    def __init__(self, display: RunDisplay) -> None:
        self._display = display

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._display.phase("training", state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._display.advance()

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        self._display.say(f"step {state.global_step}: {in_words(plain(metrics or {}))}")


class Sampling(transformers.TrainerCallback):
    """A callback that generates samples at each evaluation during training."""

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if 0 < state.global_step < state.max_steps:
            told(self._prepared)


def train(run: Run, display: RunDisplay, resume: bool = False) -> Outcome:
    """Train a run, and return its outcome. The adapter is saved in ``run.out / "adapter"``.

    Raises:
        BadInput: a model, data or option of the run cannot be used.
        TrainingError: the loss is not finite, or a disk or memory is full. The last checkpoint is complete then.
    """
    with _advice(run) as seen:
        return _train(run, display, resume, seen)


def _train(run: Run, display: RunDisplay, resume: bool, seen: _Seen) -> Outcome:
    began = time.perf_counter()
    task = task_catalogue.find(run.task)
    data = validated(task.Data, run.data, "data")
    task.check_model(run.model)
    require({name: name for name in run.training.report_to})
    folder = RunFolder(run)
    checkpoint = folder.checkpoint(resume)
    display.phase("loading", None)
    transformers.set_seed(run.training.seed)
    prepared = seen.prepared = task.prepare(run, data)
    prepared.check_method(run.method.name)
    beforehand(prepared, display)
    injection = None if run.method.name == FULL else adapted(run, prepared)
    if injection is None and prepared.check is not None:
        prepared.check(None)
    clock = Clock()
    sampling = [Sampling(prepared)] if prepared.during else []
    trainer = trainer_for(run, task, prepared, injection, [Keeper(folder), DisplayCallback(display), clock, *sampling])
    if folder.before is None or checkpoint is None:  # a run that begins anew draws what the first one drew
        # Not by trainer.evaluate(): what accelerate prepared for that alone, it does not wrap for several processes.
        trainer.args.eval_on_start = True
        folder.said = told(prepared)
    folder.note()  # now that each of several processes has read what was there
    transformers.set_seed(run.training.seed)  # what came before drew a different number of times when resuming
    if checkpoint is None or folder.longer or not _taken_back(trainer, checkpoint):
        _trained(trainer, checkpoint, run.training.report_to)
    if trainer.averages is not None:
        trainer.averages.take()
    scores = {int(entry["step"]): plain(entry) for entry in trainer.state.log_history if f"eval_{task.metric}" in entry}
    best = trainer.state.best_global_step if run.training.checkpoints is True else None
    outcome = Outcome(
        method=run.method.name,
        trainable=sum(p.numel() for p in prepared.model.parameters() if p.requires_grad),
        total=sum(p.numel() for p in prepared.model.parameters()),
        before=folder.before or {},
        after=scores[best or max(scores)],
        curve=[(step, found[task.metric]) for step, found in scores.items()],
        losses=[(int(entry["step"]), entry["loss"]) for entry in trainer.state.log_history if "loss" in entry],
        steps=trainer.state.global_step,
        seconds=time.perf_counter() - began,
        seconds_per_step=clock.seconds_per_step,
        saved=str(folder.path / ("model" if injection is None else "adapter")),
        train_size=len(prepared.train),
        held_out_size=len(prepared.held_out),
        floor=prepared.floor,
        samples=list(zip(folder.said, told(prepared), strict=True)),
        picture=str(prepared.picture or ""),
    )
    _save(trainer, prepared, Path(outcome.saved))
    if first_process():
        write_text(folder.path / "metrics.json", as_json(outcome))
    return outcome


def beforehand(prepared: Prepared, display: RunDisplay) -> None:
    """Do the task's work with the model before an adapter is installed."""
    if prepared.first is not None:
        if (device := torch.accelerator.current_accelerator(check_available=True)) is not None:
            prepared.model.to(device)  # as the Trainer does, which comes later
        display.phase(prepared.first.name, prepared.first.steps)
        prepared.first.do(display.advance)


def adapted(run: Run, prepared: Prepared, name: str | None = None) -> peftcore.Injection:
    """Return the adapter of a run: apply its method to the model of its task, or load the adapter that the run
    continues. The adapters that train together with it are applied too.

    Raises:
        BadInput: the loaded adapter lacks the head that the task trains, or the method needs the loss of the model but
            the task's Trainer computes the loss.
    """
    base = prepared.adapted or prepared.model
    if run.quantize is not None:
        peftcore.quantize(base, run.quantize)
    injection = _fresh(run, prepared, base, name) if run.adapter is None else _loaded(run, prepared, base, name)
    if prepared.check is not None:
        prepared.check(injection)
    for each in prepared.beside:
        each.apply(run.training.seed)
    return injection


def _loaded(run: Run, prepared: Prepared, base: nn.Module, name: str | None) -> peftcore.Injection:
    injection = peftcore.load(base, str(run.adapter), name=name, trainable=True)
    check_known(injection.config, prepared)
    held = injection.trained_along
    for head in prepared.head:
        if not any(path == head or path.startswith((f"{head}.", f"{head}:")) for path in held):
            raise BadInput(
                f"{run.adapter} has no head {head}, which the task {run.task} trains: begin with a fresh adapter"
            )
    return injection


def _fresh(run: Run, prepared: Prepared, base: nn.Module, name: str | None) -> peftcore.Injection:
    arguments = options_for(run.method, prepared.tasks)
    if peftcore.method(run.method.name).asks_for_data(arguments):
        if prepared.trainer is not None:
            raise BadInput(
                f"{run.method.name} computes the model's loss on batches before training, but the task {run.task} "
                "computes its loss in its own Trainer: choose another method"
            )
        batches = DataLoader(
            Subset(prepared.train, range(min(LOOKED_AT * run.training.batch_size, len(prepared.train)))),
            batch_size=run.training.batch_size,
            collate_fn=without_names(prepared),
        )
        arguments["data"] = batches if prepared.adapted is None else _of_the_whole(prepared.model, batches)
    train = (*prepared.head, *arguments.pop("train", ()))
    return peftcore.apply(base, run.method.name, name=name, train=train, seed=run.training.seed, **arguments)


def _of_the_whole(model: nn.Module, batches: Iterable[dict[str, Any]]) -> list[Callable[[nn.Module], Any]]:
    """Return the batches as functions for a method on a part of a model. Each function runs the whole model on its
    batch."""

    def run(batch: dict[str, Any], part: nn.Module) -> Any:
        return model(**batch)

    return [functools.partial(run, batch) for batch in batches]


def _taken_back(trainer: AdapterTrainer, checkpoint: Path) -> bool:
    """Load the result of a finished run and return True, if the checkpoint is from its last step, or from the step at
    which it stopped early. (The Trainer would train another step.) Otherwise return False."""
    state = transformers.TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    control = transformers.TrainerControl(**state.stateful_callbacks.get("TrainerControl", {}).get("args", {}))
    if state.global_step < state.max_steps and not control.should_training_stop:
        return False
    trainer.state = state
    trainer.take(checkpoint)
    return True


def _trained(trainer: AdapterTrainer, checkpoint: Path | None, reported: Sequence[str]) -> None:
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except OSError as error:
        raise TrainingError(f"training stopped: {error}; --resume goes on from the last whole checkpoint") from error
    except Exception as error:
        library = type(error).__module__.partition(".")[0]
        if library not in reported:
            raise
        raise TrainingError(f"training.report_to: {library} cannot log the run: {error}") from error


@dataclass
class _Seen:
    """The model and examples of a run, after they were loaded, for advice if memory is full."""

    prepared: Prepared | None = None


@contextmanager
def _advice(run: Run) -> Iterator[_Seen]:
    """Context manager that converts out-of-memory errors to TrainingError, with advice on settings that need less
    memory."""
    seen = _Seen()
    try:
        yield seen
    except (RuntimeError, MemoryError) as error:
        if not is_full(error):
            raise
        raise TrainingError(_out_of_memory(run, seen, error)) from error


def _out_of_memory(run: Run, seen: _Seen, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200]
    return f"out of memory ({reason}). {advice(run, seen.prepared)}"


def told(prepared: Prepared) -> list[str]:
    """Return the model's sample answers; empty if the task does not define samples."""
    if prepared.samples is None:
        return []
    hold_whole(prepared.model)  # a pipeline calls parts of it, not all of it
    return prepared.samples()


def _save(trainer: AdapterTrainer, prepared: Prepared, folder: Path) -> None:
    """Save the adapter and the adapters that trained together with it. In full fine-tuning, save the model instead."""
    model: Any = prepared.adapted or prepared.model
    with trainer.whole():
        if trainer.injection is None and first_process():
            model.save_pretrained(folder)
    if trainer.injection is not None and (first_process() or is_sharded(model)):  # then all of them are needed
        trainer.injection.save(folder)
    for each in prepared.beside:
        if first_process() or is_sharded(each.part):
            each.injection.save(folder.with_name(f"{folder.name}_{each.name}"))
            for name, format in each.files.items():
                each.injection.save(folder.with_name(name), format=format)


def as_json(outcome: Outcome) -> str:
    """Return the outcome as JSON, for programs."""
    return json.dumps(asdict(outcome), indent=2) + "\n"


def in_words(metrics: dict[str, float]) -> str:
    """Return metrics as one line of text."""
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
