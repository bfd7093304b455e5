"""The search for the method, its options and its sites that are best for a task within a budget.

A trial of the study is one run of a comparison, scored on a tuning split. Configurations over the budget are only
planned, never trained. The best configurations are trained with more seeds, and the best of them is chosen (the pick).
Only then a comparison scores the pick on the validation set.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from peftcore.errors import BadInput, PeftcoreError, TrainingError
from peftcore.files.safe_io import write_text
from peftcore.models.model_names import MODEL
from peftcore.utils.quiet import no_bars
from peftcore_lab.comparisons.compare import compare
from peftcore_lab.comparisons.comparison import Candidate, Comparison
from peftcore_lab.comparisons.running import Board, JobRunner, Result, run_together, run_trial, together
from peftcore_lab.data.splits import parted
from peftcore_lab.digests import of_content
from peftcore_lab.reports.report_files import write
from peftcore_lab.reports.trials import ComparisonReport, ConfigurationTrials, Trial
from peftcore_lab.runs.folder import digests_of, made
from peftcore_lab.runs.reading import validated
from peftcore_lab.runs.run import Options, Training
from peftcore_lab.searching.budget import Budget, CandidateCosts, Planner, memory, values
from peftcore_lab.searching.search_outcome import SearchOutcome, write_best
from peftcore_lab.searching.space import METHODS, SearchPoint, Space, by_default
from peftcore_lab.searching.studies import KEY, REASON, RECORD, Study
from peftcore_lab.tasks import task_catalogue
from peftcore_lab.training.fleet_runs import Saved

POLL = 1.0
"""Seconds between two checks of the trials of other workers."""
PATIENCE = 200
"""Number of consecutive points without training after which the search ends, since the space seems to lack new
points."""
TOLD = {"model", "task", "data", "tuning", "tuning_size", "methods", "learning_rate", "budget", "memory", "start"}
TRAINED = {"training", "dtype", "quantize", "seed"}


class Search(Options):
    """The schema of a search: its task and its search space."""

    model: str = Field(description=MODEL)
    task: str = "text-classification"
    """The task: text-classification, causal-lm, chat ..."""
    data: dict[str, Any]
    """Where the examples are, and the options of the task about them."""
    tuning: str | None = None
    """Other examples for choosing; without them, a part of the training examples is used."""
    tuning_size: PositiveInt | None = None
    """Number of training examples that are held out for choosing (a fifth, at most 1,000, unless set)."""
    methods: dict[str, dict[str, Any] | None] = Field(default_factory=lambda: dict.fromkeys(METHODS))
    """For each method the values to choose from: ``lora: {rank: [2, 4, 8], target: [attn.q, all-linear]}``. For names
    without values, sizes, sites and depth are tried."""
    learning_rate: Any = Field(default_factory=lambda: {"low": 3e-4, "high": 1e-1, "log": True})
    """A value, a list or a range, for methods without a learning rate in `methods`."""
    budget: str | int | None = None
    """The largest number of trainable parameters, including a new head: ``50k``; or a share of the model's parameters:
    ``0.5%``."""
    memory: str | int | None = None
    """The largest memory of a training step, as estimated by ``peftcore plan``: ``2GB``."""
    trials: PositiveInt = 20
    """Number of runs on the tuning split. Configurations over the budget are not trained and do not count."""
    together: PositiveInt = 4
    """How many trials are drawn and trained at once, on one model if their methods allow it. It is 1 if `memory` is
    set."""
    start: list[Candidate] = Field(default_factory=list)
    """Points of the space that are tried first."""
    confirm: PositiveInt = 3
    """How many of the best configurations are trained with all seeds before one is chosen."""
    finals: PositiveInt = 1
    """How many configurations are scored on the held-out examples: the chosen one, and smaller ones of the Pareto
    front."""
    seeds: list[NonNegativeInt] = Field(default=[0, 1, 2], min_length=1)
    """Seeds of the runs by which the best configuration is chosen, and of the final runs."""
    seed: NonNegativeInt = 0
    """Seed of the sampler, and of the runs in the study."""
    storage: str | None = None
    """A journal file or the URL of a database, which several workers may share. The default is the file ``study.log``
    in `out`."""
    study: str = "search"
    """Name of the study in the storage."""
    training: Training = Field(default_factory=lambda: Training.model_validate({"steps": 100}))
    dtype: str = "float32"
    """Dtype of the base's weights in memory."""
    quantize: str | None = None
    """A scheme that quantizes the base's weights before training: nf4, int8, bnb-nf4 ..."""
    out: Path = Path("peftcore-search")
    """Folder for the results and the runs."""

    @field_validator("methods", mode="before")
    @classmethod
    def _by_name_alone(cls, value: Any) -> Any:
        listed = value.split(",") if isinstance(value, str) else value
        return {str(name).strip(): None for name in listed if name} if isinstance(listed, list) else listed

    @property
    def at_once(self) -> int:
        """Return how many trials are drawn and trained at once."""
        return self.together if self.memory is None else 1

    @property
    def runs(self) -> int:
        """Return the number of runs of the whole search, if no run fails."""
        others = len({*self.seeds} - {self.seed})
        return self.trials + others * min(self.confirm, self.trials) + self.finals * len(self.seeds)

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings that must be the same for all workers of a study."""
        found: dict[str, Any] = json.loads(self.model_dump_json(include=TOLD | TRAINED))
        return found

    def comparison(
        self, data: Mapping[str, Any], candidates: list[Candidate], seeds: list[int], out: Path
    ) -> Comparison:
        """Return a comparison of the candidates."""
        shared = self.model_dump(include={"model", "task", "dtype", "quantize"})
        training = self.training.model_dump()
        listed = [each.model_dump() for each in candidates]
        whole = {**shared, "data": data, "methods": listed, "seeds": seeds, "training": training, "out": out}
        whole["together"] = self.at_once
        return validated(Comparison, whole, "search")


class SearchRun:
    """A running search.

    Raises:
        BadInput: a model, data or option cannot be used, or no configuration fits into the budget. Nothing was trained
            then.
    """

    def __init__(self, search: Search, board: Board) -> None:
        no_bars()
        self.search, self.board = search, board
        self.task = task_catalogue.find(search.task)
        self._check()
        made(search.out)
        self.tuning, self.held_out = parted(search.data, search.tuning, search.tuning_size, search.out / "data")
        self.saved: list[Saved] = []
        self.planner = self._planner()
        limit = None if search.budget is None else values(search.budget, self.planner.total)
        self.budget = Budget(limit, None if search.memory is None else memory(search.memory))
        self.space = Space({name: self._options(name) for name in search.methods}, search.learning_rate)
        self.left_out = self._fit()
        points = [self.space.parameters(self._timed(each)) for each in search.start if each.name not in self.left_out]
        where = search.storage or str(search.out / "study.log")
        content = {**digests_of(search.data), "tuning": search.tuning and of_content(search.tuning)}
        settings = {**search.settings, "content": content}
        self.study = Study(where, search.study, self.task.greater, search.seed, settings)
        for point in points:
            self.study.start_with(point)

    def _check(self) -> None:
        """Check everything that can be checked without the model, before anything is read or written."""
        self.task.check_model(self.search.model)
        Space({name: given or {} for name, given in self.search.methods.items()}, self.search.learning_rate)
        if self.search.budget is not None:
            values(self.search.budget, 1)
        if self.search.memory is not None and "together" in self.search.model_fields_set and self.search.together > 1:
            raise BadInput(
                "memory limits a step of one trial, and together trains several at once: remove memory or together"
            )
        if self.search.memory is not None and self.search.quantize is not None:
            raise BadInput("memory cannot be estimated for quantized models: remove memory or quantize")

    def _planner(self) -> Planner:
        """Return a planner with the shapes of the model and of the examples, for which both are loaded once."""
        nobody = Candidate(name=next(iter(self.search.methods)))
        run = self._on_tuning([nobody]).run(nobody, self.search.seed)
        prepared = self.task.prepare(run, validated(self.task.Data, run.data, "data"))
        return Planner(prepared, self.search.training.batch_size, self.search.memory is not None)

    def _options(self, method: str) -> dict[str, Any]:
        given = self.search.methods[method]
        return by_default(method, self.planner.layered(method)) if given is None else given

    def _timed(self, start: Candidate) -> Candidate:
        rate = start.learning_rate or self.search.training.learning_rate
        return start.model_copy(update={"learning_rate": rate})

    def _fit(self) -> dict[str, str]:
        """Remove the methods whose smallest configuration is over the budget. Return the reasons by method."""
        found = {name: self.space.smallest(name, self._cost) for name in self.space.methods}
        reasons = {name: reason for name, choice in found.items() if (reason := self._refused(choice))}
        if len(reasons) == len(found):
            smallest = min(found.values(), key=self._cost)
            raise BadInput(
                f"no candidate fits: the smallest one, {smallest}, needs {self._refused(smallest)}; raise the budget"
            )
        self.space.without(set(reasons))
        return reasons

    def _refused(self, choice: SearchPoint) -> str | None:
        """Return the reason why a point cannot be trained, or None."""
        try:
            return self.budget.over(self._needs(choice))
        except PeftcoreError as error:
            return str(error)

    def _cost(self, choice: SearchPoint) -> float:
        try:
            needs = self._needs(choice)
        except PeftcoreError:
            return math.inf
        return self.budget.excess(needs) if self.budget.trainable is None else needs.trainable

    def _needs(self, choice: SearchPoint) -> CandidateCosts:
        return self.planner.needs(choice.candidate(self.planner.host))

    def work(self) -> None:
        """Run trials until the study has the wanted number of trials, including those of other workers."""
        idle = 0
        while len(self.study.counted()) < self.search.trials and idle < PATIENCE:
            self.study.bury()
            with ExitStack() as begun:
                asked: list[tuple[optuna.trial.Trial, Candidate]] = []
                while len(asked) < self.search.at_once and idle < PATIENCE and (not asked or self._wanting()):
                    with ExitStack() as one:
                        trial = one.enter_context(self.study.trial())
                        candidate = self._chosen(trial)
                        idle = idle + 1 if candidate is None else 0
                        if candidate is not None:
                            asked.append((trial, candidate))
                            begun.push(one.pop_all())
                self._train(asked)

    def _wanting(self) -> bool:
        return len(self.study.counted()) < self.search.trials

    def _chosen(self, trial: optuna.trial.Trial) -> Candidate | None:
        """Return the candidate of a trial, or None if it need not be trained."""
        choice = self.space.suggest(trial)
        candidate = choice.candidate(self.planner.host, f"{choice.method}-{trial.number}")
        key = json.dumps([candidate.name, candidate.arguments, candidate.learning_rate], sort_keys=True)
        trial.set_user_attr(KEY, key)
        try:
            needs = self.planner.needs(candidate)
        except PeftcoreError as error:
            self.study.skip(trial, str(error))
            return None
        over = self.budget.over(needs) or self._needless(trial.number, key)
        if over:
            self.study.skip(trial, over, self.budget.excess(needs))
            return None
        return candidate

    def _needless(self, number: int, key: str) -> str | None:
        earlier = [each for each in self.study.counted() if each.number < number]
        if len(earlier) >= self.search.trials:
            return "the number of trials is reached"
        same = [each.number for each in earlier if each.user_attrs.get(KEY) == key]
        return f"the same as trial {same[0]}" if same else None

    def _train(self, asked: list[tuple[optuna.trial.Trial, Candidate]]) -> None:
        found = self._scored([candidate for _, candidate in asked], [self.search.seed], self.search.seed)
        for trial, candidate in asked:
            result = found[candidate.called]
            if isinstance(result, TrainingError):
                self.study.fail(trial, str(result))
            else:
                self.study.done(trial, result.after[self.task.metric], result.trainable, asdict(result))

    def _scored(self, candidates: list[Candidate], seeds: list[int], seed: int) -> dict[str, Trial | TrainingError]:
        """Train candidates, together if possible, and score each of them on the tuning split. Return the result or the
        error of each candidate, by label."""
        results: dict[str, Trial | TrainingError] = {}
        comparison = self._on_tuning(candidates, seeds) if candidates else None
        for group in together(comparison, candidates, seed) if comparison is not None else []:
            assert comparison is not None
            if len(group) > 1:
                done = run_together(comparison, group, seed, self.board, self.saved)
                results |= {each.called: self._result(each, found) for each, found in zip(group, done, strict=True)}
                continue
            (candidate,) = group
            self.board.begin(candidate.called)
            try:
                result: Result = run_trial(comparison, candidate, seed, self.board)
            except TrainingError as error:
                result = error
            results[candidate.called] = self._result(candidate, result)
        return results

    def _result(self, candidate: Candidate, found: Result) -> Trial | TrainingError:
        result = found if isinstance(found, TrainingError) else found.trial
        if not isinstance(result, TrainingError) and not math.isfinite(score := result.after[self.task.metric]):
            result = TrainingError(f"the {self.task.metric} is {score}")
        if isinstance(result, TrainingError):
            self.board.finish(f"{candidate.called:<20} failed: {result}")
        else:
            score = result.after[self.task.metric]
            self.board.finish(f"{candidate.called:<20} {self.task.metric} {score:.3f}, {result.trainable:,} parameters")
        return result

    def _on_tuning(self, candidates: list[Candidate], seeds: list[int] | None = None) -> Comparison:
        out = self.search.out / "search"
        return self.search.comparison(self.tuning, candidates, seeds or [self.search.seed], out)

    def finish(self, place: JobRunner | None = None) -> SearchOutcome:
        """Return the outcome of the search. Wait for the trials of other workers, choose the best configuration, and
        score it on the validation set. `place` executes these last runs."""
        began = time.perf_counter()
        self.work()
        while self.study.running():
            time.sleep(POLL)
            self.study.bury()
            self.work()
        trials = self.study.trials()
        trained = tuple(Trial(**each.user_attrs[RECORD]) for each in trials if each.state is TrialState.COMPLETE)
        if not trained:
            reasons = sorted({str(each.user_attrs.get(REASON)) for each in trials})
            raise TrainingError(f"no trial reached a score: {'; '.join(reasons[:3])}")
        tried = self._report(trained, began)
        write(tried, self.search.out / "search")
        confirmed = self._confirmed(tried)
        pick = ranked(confirmed)[0]
        final = self._final(tried, pick)
        report = compare(final, self.board, place=place)
        found = SearchOutcome(trials, tried, confirmed, pick, report, self.budget, self.left_out)
        write_text(self.search.out / "search.json", found.as_json())
        write_best(final.run(final.methods[0], self.search.seeds[0]), self.search.out)
        return found

    def _final(self, tried: ComparisonReport, pick: ConfigurationTrials) -> Comparison:
        """Return the comparison of the chosen configuration (the pick) with smaller ones of the Pareto front."""
        smaller = [entry for entry in reversed(tried.front()) if entry.trainable < pick.trainable]
        chosen = [candidate_of(entry) for entry in (pick, *smaller[: self.search.finals - 1])]
        return self.search.comparison(self.held_out, chosen, self.search.seeds, self.search.out)

    def _confirmed(self, tried: ComparisonReport) -> ComparisonReport:
        """Return a report of the best configurations, each trained with all seeds, since a single run may be good by
        chance.

        Raises:
            TrainingError: none of them can be trained with the other seeds.
        """
        began = time.perf_counter()
        others = [seed for seed in self.search.seeds if seed != self.search.seed]
        trials: list[Trial] = []
        failed: dict[str, str] = {}
        best = ranked(tried)[: self.search.confirm]
        found = {
            seed: self._scored([candidate_of(entry) for entry in best], [self.search.seed, *others], seed)
            for seed in others
        }
        for entry in best:
            results = [found[seed][entry.label] for seed in others]
            wrong = [each for each in results if isinstance(each, TrainingError)]
            if wrong:
                failed[entry.label] = str(wrong[0])
            else:
                trials += [*entry.trials, *(each for each in results if isinstance(each, Trial))]
        if not trials:
            raise TrainingError("; ".join(f"{label}: {reason}" for label, reason in failed.items()))
        return self._report(tuple(trials), began, failed)

    def _report(
        self, trials: tuple[Trial, ...], began: float, failed: dict[str, str] | None = None
    ) -> ComparisonReport:
        """Return a report of runs on the tuning split."""
        return ComparisonReport(
            model=self.search.model,
            task=self.search.task,
            data=f"{self.search.data['train']} (scored: the tuning split)",
            metric=self.task.metric,
            greater=self.task.greater,
            train_size=self.planner.train_size,
            held_out_size=self.planner.held_out_size,
            floor=self.planner.floor,
            training=self.search.training.model_dump(mode="json"),
            trials=trials,
            seconds=time.perf_counter() - began,
            failed=failed or {},
            together=tuple(map(str, self.saved)),
        )


def search(what: Search, board: Board) -> SearchOutcome:
    """Run a search and return its outcome. ``search.json``, ``best.yaml``, the report of the chosen configuration and
    the runs are written to ``what.out``.

    Raises:
        BadInput: a model, data or option cannot be used, or no configuration fits into the budget. Nothing was trained
            then.
    """
    return SearchRun(what, board).finish()


def work(what: Search, board: Board) -> int:
    """Run trials of a study that another process finishes. Return the number of trials so far."""
    running = SearchRun(what, board)
    running.work()
    return len(running.study.counted())


def ranked(report: ComparisonReport) -> list[ConfigurationTrials]:
    """Return the entries, ordered from the best to the worst. Of equally good entries, the smaller one is first."""
    sign = -1 if report.greater else 1
    return sorted(report.entries(), key=lambda each: (sign * each.score, each.trainable))


def candidate_of(entry: ConfigurationTrials) -> Candidate:
    """Return the candidate from which an entry was trained."""
    first = entry.trials[0]
    return Candidate(name=first.method, label=entry.label, learning_rate=first.learning_rate, **first.options)
