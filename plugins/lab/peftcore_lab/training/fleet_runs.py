"""Runs that differ only in the method, its options and the learning rate train together on one model, as a fleet. Each
run has the same result as alone, and the same files in its folder, except logs and checkpoints."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import peftcore
from peftcore.errors import RouteError, TrainingError
from peftcore.files.safe_io import write_text
from peftcore.fleets.losses import kind_of
from peftcore.fleets.member import Member
from peftcore.models.costs import held
from peftcore.training import Fleet
from peftcore_lab.runs.folder import RunFolder, plain
from peftcore_lab.runs.reading import validated
from peftcore_lab.runs.run import FULL, Run
from peftcore_lab.tasks import task_catalogue
from peftcore_lab.tasks.task import Prepared
from peftcore_lab.training.memory import is_full
from peftcore_lab.training.run_trainer import AdapterTrainer, trainer_for
from peftcore_lab.training.train import Outcome, RunDisplay, adapted, as_json, beforehand, in_words, told

CHOSEN = {"method": True, "out": True, "training": {"learning_rate"}}
"""Fields of `Run` in which runs that train together may differ, in the form of the argument ``exclude`` of pydantic."""


@dataclass(frozen=True)
class Saved:
    """The costs of runs that trained together, and the costs of the same runs one after the other."""

    runs: int
    base_bytes: int
    """Bytes of the base model, which was loaded and stored once instead of `runs` times."""
    forwards: int
    """Number of forwards of the base in training; each forward has the rows of all runs."""
    alone: int
    """Number of forwards that the runs would have needed one after the other."""

    def __str__(self) -> str:
        return (
            f"{self.runs} runs together: one base of {self.base_bytes / 1e6:,.1f} MB loaded and held once, not "
            f"{self.runs} times; {self.forwards:,} forwards of it in training instead of {self.alone:,}"
        )


def key(run: Run) -> str | None:
    """Returns a key that is equal for runs that can train together, or None if the run has to train alone. A run trains
    alone if the whole model trains, its method acts on the whole batch or needs data, rows belong to several tasks, or
    an option needs the Trainer (checkpoints, averages, several batches a step, gradient checkpointing, quantized bases,
    several processes)."""
    asked = run.training
    if run.data.get("task_column") is not None:  # whose rows a call would have to tell is not known in a fleet
        return None
    if run.method.name == FULL or run.quantize is not None or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return None
    if asked.checkpoints or asked.accumulate > 1 or asked.checkpoint_gradients or asked.shard or asked.ema is not None:
        return None
    method = peftcore.method(run.method.name)
    if not method.tags.per_row or method.asks_for_data(run.method.arguments):
        return None
    return json.dumps(run.model_dump(mode="json", exclude=CHOSEN), sort_keys=True)  # type: ignore[arg-type]


class _Shared:
    """The batches of the Trainer, which are read once for all runs."""

    def __init__(self, loader: Any, count: int) -> None:
        self._loader, self._count = loader, count
        self._epochs: dict[int, list[Iterator[Any]]] = {}

    def __call__(self, epoch: int) -> Iterator[Any]:
        if not self._epochs.get(epoch):
            self._epochs = {epoch: list(itertools.tee(self._begun(epoch), self._count))}
        return self._epochs[epoch].pop()

    def _begun(self, epoch: int) -> Iterator[Any]:
        self._loader.set_epoch(epoch)
        yield from self._loader


class _Group:
    """Runs that train together: one model, and an adapter of each run on it."""

    def __init__(self, runs: Sequence[Run], display: RunDisplay) -> None:
        first = runs[0]
        self.runs, self.display, self.task = [*runs], display, task_catalogue.find(first.task)
        self.began = time.perf_counter()
        self.folders = [RunFolder(run) for run in runs]
        for folder in self.folders:
            folder.checkpoint(False)
        display.phase("loading", None)
        transformers.set_seed(first.training.seed)
        self.prepared: Prepared = self.task.prepare(first, validated(self.task.Data, first.data, "data"))
        beforehand(self.prepared, display)
        self.model: nn.Module = self.prepared.model
        self.weights = sum(each.numel() for each in self.model.parameters())
        self.base_bytes = held((*self.model.parameters(), *self.model.buffers()))
        self.results: list[Outcome | TrainingError | None] = [None] * len(runs)
        self.injections: dict[int, peftcore.Injection] = {}
        self.seconds = 0.0

    def fits(self) -> bool:
        """Return whether a separate loss can be computed for each row of the model's output."""
        prepared = self.prepared
        plain = prepared.trainer is None and prepared.adapted is None and not prepared.beside
        return plain and kind_of(self.model) is not None

    def adapt(self) -> None:
        """Apply the method of each run to the base model without the other adapters. Adapters that cannot be routed are
        removed; their runs train alone."""
        for number, run in enumerate(self.runs):
            with peftcore.activate(self.model):
                injection = adapted(run, self.prepared, name=f"run{number}")
            try:
                injection.check_routable()
            except RouteError:
                injection.remove()
                continue
            self.injections[number] = injection

    def train(self) -> Saved | None:
        """Train all runs together, and return the saved costs; None if fewer than two can train together."""
        self.adapt()
        if len(self.injections) < 2:
            return None
        first = self.runs[0]
        trainer = trainer_for(first, self.task, self.prepared, None, [])
        for number, injection in self.injections.items():
            self.folders[number].before = self._scores(trainer, injection)
            self.folders[number].said = self._said(injection)
            self.folders[number].note()
        transformers.set_seed(first.training.seed)
        loader = trainer.get_train_dataloader()
        steps = trainer.set_initial_training_values(trainer.args, loader)[-1]
        trainer.state.compute_steps(trainer.args, steps)  # type: ignore[no-untyped-call]
        fleet = Fleet(self.model, autocast=torch.bfloat16 if first.training.autocast else None)
        shared = _Shared(loader, len(self.injections))
        members = {number: self._join(fleet, trainer, number, shared, steps) for number in self.injections}
        curves = {number: {0: self.folders[number].before or {}} for number in members}
        self.display.phase(f"training {len(members)} runs together", steps)
        every = int(trainer.state.eval_steps)
        step = 0
        while fleet.active:
            began = time.perf_counter()
            self.model.train()
            fleet.step()
            self.seconds += time.perf_counter() - began
            step += 1
            self.display.advance()
            if step % every == 0 or step >= steps:
                for number, member in members.items():
                    if member.step == step:
                        curves[number][step] = self._scores(trainer, member.injection)
                        self._say(number, step, curves[number][step])
        for number, member in members.items():
            self.results[number] = self._outcome(number, member, curves[number], every, len(members))
        return Saved(len(members), self.base_bytes, fleet.forwards, fleet.alone)

    def _join(self, fleet: Fleet, trainer: AdapterTrainer, number: int, shared: _Shared, steps: int) -> Member:
        asked, injection = self.runs[number].training, self.injections[number]
        optimizer = injection.optimizer(
            torch.optim.AdamW, lr=asked.learning_rate, weight_decay=asked.weight_decay, total_steps=steps
        )
        schedule: Any = transformers.get_scheduler(
            asked.schedule, optimizer, num_warmup_steps=trainer.args.get_warmup_steps(steps), num_training_steps=steps
        )
        return fleet.join(
            injection, shared, optimizer=optimizer, schedule=schedule, steps=steps, clip=asked.clip, seed=asked.seed
        )

    def _scores(self, trainer: AdapterTrainer, injection: peftcore.Injection) -> dict[str, float]:
        with peftcore.activate(self.model, injection.name):
            return plain(trainer.evaluate())

    def _said(self, injection: peftcore.Injection) -> list[str]:
        with peftcore.activate(self.model, injection.name):
            return told(self.prepared)

    def _say(self, number: int, step: int, scores: dict[str, float]) -> None:
        self.display.say(f"{self.runs[number].out.name}, step {step}: {in_words(scores)}")

    def _outcome(
        self, number: int, member: Member, curve: dict[int, dict[str, float]], every: int, together: int
    ) -> Outcome | TrainingError:
        if member.failed:
            return TrainingError(member.ended)
        injection, folder, metric = member.injection, self.folders[number], self.task.metric
        own = [*injection.parameters()]
        ends = sorted({*range(every, member.step + 1, every), member.step})
        begins = [0, *ends[:-1]]
        outcome = Outcome(
            method=self.runs[number].method.name,
            trainable=sum(each.numel() for each in own if each.requires_grad),
            total=self.weights + sum(each.numel() for each in own),
            before=folder.before or {},
            after=curve[max(curve)],
            curve=[(step, scores[metric]) for step, scores in curve.items()],
            losses=[(b, sum(member.losses[a:b]) / (b - a)) for a, b in zip(begins, ends, strict=True)],
            steps=member.step,
            seconds=(time.perf_counter() - self.began) / together,
            seconds_per_step=self.seconds / max(member.step, 1) / together,
            saved=str(folder.path / "adapter"),
            train_size=len(self.prepared.train),
            held_out_size=len(self.prepared.held_out),
            floor=self.prepared.floor,
            samples=list(zip(folder.said, self._said(injection), strict=True)),
        )
        injection.save(Path(outcome.saved))
        write_text(folder.path / "metrics.json", as_json(outcome))
        return outcome


def train_together(
    runs: Sequence[Run], display: RunDisplay
) -> tuple[list[Outcome | TrainingError | None], Saved | None]:
    """Train runs with the same `key` together. The times of a run are those of all runs divided by their number.

    Returns:
        Two values. The first has for each run its result, its error, or None if it has to be trained alone (all runs,
        if memory is too small for all at once). The second one is the saved costs; None if no runs trained together.

    Raises:
        BadInput: a model, data or option of the runs cannot be used.
        TrainingError: a disk is full.
    """
    group = _Group(runs, display)
    if not group.fits():
        return group.results, None
    try:
        saved = group.train()
    except RouteError:  # rows turned out to be mixed in a forward
        return [None] * len(runs), None
    except (RuntimeError, MemoryError) as error:
        if not is_full(error):
            raise
        display.say(
            f"out of memory with {len(runs)} runs at once: now one after the other; set --together 1 to start like that"
        )
        return [None] * len(runs), None
    return group.results, saved
