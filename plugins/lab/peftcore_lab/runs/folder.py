"""The folders of runs. Creates a folder, and reads from it the run's settings, the scores before training, and the
checkpoint to resume from.

Several processes of one run share a folder; the first process writes to it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers

import peftcore
from peftcore.errors import BadInput
from peftcore.files.continuing import differences, listed
from peftcore.files.safe_io import make_folder, sync_file, sync_folder, write_text
from peftcore.models.model_names import find
from peftcore_lab.data.example_sources import digest
from peftcore_lab.digests import of_content, of_sample
from peftcore_lab.runs.run import FULL, Run

COMPLETE = "complete"
"""The file that is written last into a checkpoint. A checkpoint without it is incomplete."""


RUN = "run.json"
"""The file with the settings of a run, which identify the run."""


def made(folder: Path) -> Path:
    """Create a folder and its parents, if they do not exist, and return it.

    Raises:
        BadInput: the folder cannot be created.
    """
    try:
        make_folder(folder)
    except OSError as error:
        raise BadInput(f"{folder}: cannot be written to ({error.strerror})") from None
    return folder


def first_process() -> bool:
    """Return whether this is the only process, or the first process that torchrun or accelerate started."""
    return os.environ.get("RANK", "0") == "0"


def forget(folder: Path) -> None:
    """Remove the folder of a run. Its settings are removed first, so that an interruption leaves no run that could be
    resumed."""
    (folder / RUN).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def processes() -> int:
    """Return how many processes share the run, from the environment variable that torchrun, accelerate and Ray Train
    set."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def holds(run: Run) -> bool:
    """Return whether the folder of a run contains this run, unfinished or finished, with the same settings and
    inputs."""
    try:
        held = json.loads((run.out / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(held, dict) and held.get("run") == _settings(run) and not changed_inputs(held, inputs_of(run))


def _settings(run: Run) -> dict[str, Any]:
    return run.model_dump(mode="json", exclude={"out"})


def inputs_of(run: Run) -> dict[str, str | None]:
    """Return digests of the files that a run reads: its examples, its model and the adapter that it continues."""
    found = digests_of(run.data)
    places = find(run.model).local()
    found["model"] = of_sample(str(places[0])) if places else None
    found["adapter"] = None if run.adapter is None else of_content(run.adapter)
    return found


def digests_of(data: Mapping[str, Any]) -> dict[str, str | None]:
    """Return digests of the examples that the data options of a task name: digests of files, or commits of datasets on
    the Hub."""
    named = {name: data.get(name) for name in ("train", "held_out")}
    return {f"data.{name}": None if source is None else digest(str(source)) for name, source in named.items()}


def changed_inputs(held: Mapping[str, Any], here: Mapping[str, str | None]) -> list[str]:
    """Return a line for each input whose digest differs from the one in the stored settings of a run."""
    then = held.get("inputs", here)
    return [f"the content of {name} changed" for name in here if then.get(name) != here[name]]


CUT = ("batch_size", "accumulate")
"""Options that determine how the examples of a step are split into batches. A resumed run may change them if the number
of examples of a step remains the same."""


def _examples(training: dict[str, Any], shared_by: int) -> int:
    """Return the number of examples of a step, over all processes."""
    return int(training["batch_size"] * training["accumulate"] * shared_by)


class RunFolder:
    """The folder of one run.

    Attributes:
        before: the scores before training, once they are known.
        said: the sample answers of the model before training.
        longer: whether a run is resumed with more steps than before.
    """

    def __init__(self, run: Run) -> None:
        self.path, self._run, self._inputs = run.out, _settings(run), inputs_of(run)
        self.method = None if run.method.name == FULL else peftcore.method(run.method.name)
        self.before: dict[str, float] | None = None
        self.said: list[str] = []
        self.longer = False

    @property
    def adapter(self) -> Path:
        """Return the folder of the finished adapter."""
        return self.path / "adapter"

    def checkpoint(self, resume: bool) -> Path | None:
        """Return the checkpoint to resume from, or None. For a new run, create the folder.

        Raises:
            BadInput: a run is new but the folder already contains a run, or a run is to be resumed but the folder does
                not contain it.
        """
        if resume:
            return self._newest()
        if first_process() and (self.path / RUN).exists():
            raise BadInput(
                f"{self.path} holds a run already: add --resume to continue it, or set --out to another folder"
            )
        made(self.path)
        return None

    def _newest(self) -> Path | None:
        """Return the newest complete checkpoint in the folder, or None. Incomplete checkpoints are removed."""
        if not (self.path / RUN).exists():
            if _is_bare(self.path):
                return None
            raise BadInput(f"{self.path} holds no run to resume: remove --resume, or set --out to the folder of a run")
        held = json.loads((self.path / RUN).read_text(encoding="utf-8"))
        changed = changed_inputs(held, self._inputs)
        self._check_goes_on(held["run"], held.get("processes", processes()), changed)
        self.before, self.said = held["before"], held["said"]
        found = list(self.path.glob("checkpoints/checkpoint-*"))
        whole = [each for each in found if (each / COMPLETE).exists()]
        if first_process():
            for each in set(found) - set(whole):
                shutil.rmtree(each)
        return max(whole, key=lambda each: int(each.name.rpartition("-")[2]), default=None)

    def _check_goes_on(self, held: dict[str, Any], shared_by: int, changed: list[str]) -> None:
        """Check that the stored run `held` can be resumed as this run. It must have the same settings, except that this
        run may be longer, and the same number of examples in a step. `shared_by` is the number of processes of the
        stored run, and `changed` lists its changed inputs.

        Raises:
            BadInput: it is another run, or this run is longer and its method has a schedule over all steps.
        """
        without = {"training": None}
        other = differences({**held, **without}, {**self._run, **without}) + changed
        mine, before = self._run["training"], held["training"]
        now, then = _examples(mine, processes()), _examples(before, shared_by)
        if now != then and shared_by != processes():
            raise BadInput(
                f"{self.path} holds a run of {then} examples a step in {shared_by} process(es); with {processes()} "
                f"process(es) a step would have {now}: set training.batch_size or training.accumulate so that it has "
                f"{then}"
            )
        options = [name for name in mine if mine[name] != before.get(name) and (now != then or name not in CUT)]
        self.longer = _is_longer(mine, before, options)
        if options and not self.longer:
            former, wanted = ({name: each.get(name) for name in options} for each in (before, mine))
            other += differences(former, wanted, "training")
        if other:
            raise BadInput(
                f"{self.path} holds another run: {listed(other)}. Resume it with the same options (steps or epochs may "
                "grow), or set --out to another folder"
            )
        if self.longer and self.method is not None and self.method.tags.scheduled:
            raise BadInput(
                f"{self.method.name} follows a schedule over all steps, so a run with it cannot get longer: set the "
                "former steps or epochs, or begin another run with --out"
            )

    def note(self) -> None:
        """Write the run's settings and its scores before training, so that the run can be resumed."""
        if first_process():
            known = {"run": self._run, "inputs": self._inputs, "processes": processes()}
            known |= {"before": self.before, "said": self.said}
            write_text(self.path / RUN, json.dumps(known, indent=2) + "\n")


def _is_empty(path: Path) -> bool:
    """Return whether a path is a folder without content, as the Trainer makes one before the first checkpoint."""
    return path.is_dir() and not any(path.iterdir())


def _is_bare(folder: Path) -> bool:
    """Return whether a run may have been killed in this folder before its settings were written."""
    return folder.is_dir() and all(each.suffix == ".partial" or _is_empty(each) for each in folder.iterdir())


def _is_longer(mine: dict[str, Any], held: dict[str, Any], changed: list[str]) -> bool:
    """Return whether the only change of the training options is a larger number of steps or epochs."""
    if len(changed) != 1 or changed[0] not in ("steps", "epochs"):
        return False
    before, now = held[changed[0]], mine[changed[0]]
    return before is not None and now is not None and bool(now >= before)


class Keeper(transformers.TrainerCallback):
    """A callback that stores the scores before training, and marks checkpoints as complete."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        if self._folder.before is None:
            self._folder.before = plain(metrics or {})
            self._folder.note()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            for each in folder.rglob("*"):
                sync_folder(each) if each.is_dir() else sync_file(each)
            write_text(folder / COMPLETE, "")
            sync_folder(folder.parent)


def plain(metrics: dict[str, float]) -> dict[str, float]:
    """Return the scores from the Trainer's metrics, without its timings."""
    clock = ("runtime", "per_second", "model_preparation_time")
    scores = {name: value for name, value in metrics.items() if name.startswith("eval_") and not name.endswith(clock)}
    return {name.removeprefix("eval_"): value for name, value in scores.items()}
