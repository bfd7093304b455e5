"""An optuna study that several workers may share, and continue after one of them was killed.

Every worker writes a sign of life every few seconds. If the signs of a worker stop, the first other worker that notices
it marks its trial as lost, and the point of that trial is tried again. Workers of a journal file also have a shared
lock on the file. If a worker starts and all other workers are gone, it gets an exclusive lock. Then all running trials
are lost, and it need not wait.

The random draw of a point depends on the trial's number, without counting earlier lost trials. So a search that was
killed draws the same points as one that was not.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import optuna
from optuna.exceptions import ExperimentalWarning, OptunaError, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from peftcore.errors import BadInput
from peftcore.files.continuing import differences, listed

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

BEAT, GRACE = 10.0, 90.0
"""Seconds between two signs of life of a worker, and seconds without a sign after which the worker counts as lost."""
STARTUP = 8
"""Number of points that are drawn at random before the sampler uses earlier results."""
ALIVE, LOST, REASON, RECORD, KEY, INSTEAD = "alive", "lost", "reason", "record", "key", "instead"
"""Names of the attributes of a trial. `KEY` identifies a trial by all settings that determine its score. `INSTEAD` is
the number of the lost trial that a trial repeats."""
BUDGET = "budget"
"""The name of the constraint with which the sampler learns which points are over the budget."""


UNUSABLE = (OSError, ValueError, KeyError, ImportError, SQLAlchemyError, OptunaError)
"""Errors that optuna raises for a storage that is missing, read-only, or another kind of file."""


def storage_of(where: str) -> BaseStorage:
    """Return the storage of studies: a database, given by its URL, or a journal file."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    return RDBStorage(where) if "://" in where else JournalStorage(JournalFileBackend(where))


@contextlib.contextmanager
def _opening(where: str) -> Iterator[None]:
    """Context manager that converts all errors of a storage to BadInput."""
    try:
        yield
    except UNUSABLE as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise BadInput(
            f"storage={where}: cannot be used ({type(error).__name__}: {reason}); name a file in a folder that can be "
            "written to, or a database: sqlite:///study.db"
        ) from None


class Study:
    """The study of one search.

    Args:
        where: the file or URL of the storage.
        name: the name of the study in the storage.
        greater: whether a higher metric is better.
        seed: the seed of the sampler.
        settings: the settings of the search; only the same search can continue a study.

    Raises:
        BadInput: the storage cannot be written, or contains another search with this name.
    """

    def __init__(self, where: str, name: str, greater: bool, seed: int, settings: Mapping[str, Any]) -> None:
        self._seed = seed
        directions = [StudyDirection.MAXIMIZE if greater else StudyDirection.MINIMIZE, StudyDirection.MINIMIZE]
        self._lock = _Lock()
        """The lock, which is held as long as this study is used."""
        with contextlib.ExitStack() as begun:
            with _opening(where), _hushed():
                alone = begun.enter_context(self._lock.begun(where))
                self._storage = storage_of(where)
                self._study = optuna.create_study(
                    storage=self._storage, study_name=name, directions=directions, load_if_exists=True
                )
            self._check(where, settings)
            if alone:
                self._recover()

    def _check(self, where: str, settings: Mapping[str, Any]) -> None:
        held = self._study.user_attrs.get("search")
        if held is None:
            self._study.set_user_attr("search", dict(settings))
        elif held != settings:
            other = listed(differences(held, settings))
            raise BadInput(
                f"storage={where} holds the study {self._study.study_name} of another search: {other}. Name another "
                "storage, or another study"
            )

    def _recover(self) -> None:
        """Mark all running trials as lost, and try the points of all lost trials again. It is called if no other worker
        is active."""
        for each in self.running():
            self._give_up(each.number)
        tried = {each.user_attrs.get(INSTEAD) for each in self.trials()}
        for each in self.trials():
            if LOST in each.user_attrs and each.number not in tried:
                self._try_again(each.number)

    def trials(self) -> list[FrozenTrial]:
        """Return all trials, including those of other workers."""
        trials: list[FrozenTrial] = self._study.get_trials(deepcopy=False)
        return trials

    def counted(self) -> list[FrozenTrial]:
        """Return the trials that count as runs: those that were trained, failed in training, or are running."""
        return [each for each in self.trials() if _counts(each)]

    def running(self) -> list[FrozenTrial]:
        """Return the trials that are running."""
        return [each for each in self.trials() if each.state is TrialState.RUNNING]

    def start_with(self, parameters: Mapping[str, Any]) -> None:
        """Add this point to those that are tried first, unless another worker has added it."""
        self._study.enqueue_trial(dict(parameters), skip_if_exists=True)

    @contextlib.contextmanager
    def trial(self) -> Iterator[optuna.trial.Trial]:
        """Context manager of the next trial. Call `done`, `skip` or `fail` at its end. If an error is raised instead,
        the trial counts as lost, and its point is tried again."""
        with _hushed():
            trial = self._study.ask()
            # By the number of the trial: one worker, and one that goes on, get the same points.
            number = trial.number - sum(LOST in each.user_attrs for each in self.trials()[: trial.number])
            self._study.sampler = optuna.samplers.TPESampler(
                seed=(self._seed * 1_000_003 + number) % 2**32,
                n_startup_trials=STARTUP,
            )
            try:
                with _alive(trial):
                    yield trial
            except BaseException:
                self._give_up(trial.number)
                raise

    def done(self, trial: optuna.trial.Trial, score: float, trainable: int, record: Mapping[str, Any]) -> None:
        """Record the result of a trained trial. Nothing is recorded if another worker has marked the trial as lost,
        since this worker gave no sign of life."""
        with contextlib.suppress(UpdateFinishedTrialError):
            trial.set_user_attr(RECORD, dict(record))
            self._tell(trial.number, TrialState.COMPLETE, [score, trainable])

    def skip(self, trial: optuna.trial.Trial, reason: str, excess: float = -1.0) -> None:
        """Record a trial that is not trained. It does not count as a run."""
        trial.set_user_attr(REASON, reason)
        trial.set_constraint(BUDGET, excess)
        self._tell(trial.number, TrialState.PRUNED)

    def fail(self, trial: optuna.trial.Trial, reason: str) -> None:
        """Record a trial whose training failed."""
        trial.set_user_attr(REASON, reason)
        self._tell(trial.number, TrialState.FAIL)

    def _tell(self, number: int, state: TrialState, values: list[float] | None = None) -> None:
        self._study.tell(number, values, state, skip_if_finished=True)

    def bury(self) -> None:
        """Mark the trials of lost workers as lost."""
        for each in self.running():
            if time.time() - last_sign(each) > GRACE:
                self._give_up(each.number)

    def _give_up(self, number: int) -> None:
        key = self._id(number)
        with contextlib.suppress(UpdateFinishedTrialError):  # another worker was faster
            self._storage.set_trial_user_attr(key, LOST, True)
            self._storage.set_trial_user_attr(key, REASON, "its worker was lost")
            if self._storage.set_trial_state_values(key, TrialState.FAIL):
                self._try_again(number)

    def _try_again(self, number: int) -> None:
        """Add the point of a lost trial to those that are tried next. If the trial was lost while its point was drawn,
        only its fixed parameters are added, and the others are drawn again in the same way."""
        lost = self._storage.get_trial(self._id(number))
        point = lost.params if KEY in lost.user_attrs else lost.system_attrs.get("fixed_params", {})
        self._study.enqueue_trial(point, user_attrs={INSTEAD: number})

    def _id(self, number: int) -> int:
        study = self._storage.get_study_id_from_name(self._study.study_name)
        return int(self._storage.get_trial_id_from_study_id_trial_number(study, number))


class _Lock:
    """The lock of a journal file, which all workers of the journal share."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None

    @contextlib.contextmanager
    def begun(self, where: str) -> Iterator[bool]:
        """Context manager whose value is True if no other worker uses the journal. Other workers that start meanwhile
        wait for its end. For a database, and on systems without file locks, the value is always False."""
        if fcntl is None or "://" in where:
            yield False
            return
        self._file = open(where, "ab+")  # noqa: SIM115  # held until the study is thrown away
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            alone = False
        else:
            alone = True
            _mend(self._file, Path(f"{where}.lock"))
        try:
            yield alone
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_SH)


def _mend(journal: IO[bytes], lock: Path) -> None:
    """Remove the traces of a worker that was killed while it wrote: the lock of optuna, and an incomplete line."""
    if lock.is_symlink():
        lock.unlink()
    journal.seek(0)
    held = journal.read()
    if held.startswith(b'{"op_code"'):
        journal.truncate(held.rfind(b"\n") + 1)


def last_sign(trial: FrozenTrial) -> float:
    """Return the time of the last sign of life from a trial's worker."""
    began = trial.datetime_start or datetime.now()
    return max(began.timestamp(), float(trial.user_attrs.get(ALIVE, 0.0)))


def _counts(trial: FrozenTrial) -> bool:
    if trial.state is TrialState.FAIL:
        return LOST not in trial.user_attrs
    return trial.state in (TrialState.COMPLETE, TrialState.RUNNING)


@contextlib.contextmanager
def _alive(trial: optuna.trial.Trial) -> Iterator[None]:
    """Context manager that writes a sign of life of the worker every few seconds."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT):
            with contextlib.suppress(StorageInternalError, UpdateFinishedTrialError):  # busy; given up by others
                trial.set_user_attr(ALIVE, time.time())

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Context manager that suppresses optuna's warnings about experimental features."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield
