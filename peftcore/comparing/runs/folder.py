"""The folders of runs: made, or refused; which run one holds, what the model was worth before, and where to go on from.

Several processes of one run share it; the first writes.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import transformers

import peftcore
from peftcore.comparing.errors import BadInput
from peftcore.comparing.runs.run import FULL, Run
from peftcore.files.safe_io import write_text

COMPLETE = "complete"
"""The last file of a checkpoint: one without it was being written when the run ended."""


RUN = "run.json"
"""The file by which a run is known again."""


def made(folder: Path) -> Path:
    """Make a folder, with those above it; it may be there already.

    Raises:
        BadInput: it cannot be.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{folder}: cannot be written to ({error.strerror})") from None
    return folder


def first_process() -> bool:
    """Whether this is the only process, or the first of those that torchrun or accelerate started."""
    return os.environ.get("RANK", "0") == "0"


def holds(run: Run) -> bool:
    """Whether the folder of a run holds it, begun or finished, with these settings."""
    try:
        held = json.loads((run.out / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(held, dict) and held.get("run") == _settings(run)


def _settings(run: Run) -> dict[str, Any]:
    return run.model_dump(mode="json", exclude={"out"})


class RunFolder:
    """Holds one run and no other.

    Attributes:
        before: the scores before training, once they are known.
        said: what the model said then.
    """

    def __init__(self, run: Run) -> None:
        self.path, self._run = run.out, _settings(run)
        self.method = None if run.method.name == FULL else peftcore.method(run.method.name)
        self.before: dict[str, float] | None = None
        self.said: list[str] = []

    @property
    def adapter(self) -> Path:
        """Return the folder of the finished adapter."""
        return self.path / "adapter"

    def checkpoint(self, resume: bool) -> Path | None:
        """Return the checkpoint to go on from; where a run begins, make its folder.

        Raises:
            BadInput: there is a run here where one begins, or no such run where one goes on.
        """
        if resume:
            return self._newest()
        if first_process() and (self.path / RUN).exists():
            raise BadInput(f"{self.path} holds a run already: --resume goes on with it, --out names another folder")
        made(self.path)
        return None

    def _newest(self) -> Path | None:
        """Return the newest whole checkpoint of the run that is here, if there is one; what is half written goes."""
        if not (self.path / RUN).exists():
            raise BadInput(f"{self.path} holds no run to go on with")
        held = json.loads((self.path / RUN).read_text(encoding="utf-8"))
        other = sorted(name for name in self._run if self._run[name] != held["run"].get(name))
        if other and not (other == ["training"] and self._is_longer(held["run"]["training"])):
            raise BadInput(
                f"{self.path} holds a run with another {', '.join(other)}; only the same one can go on, or one of more "
                "steps or epochs"
            )
        self.before, self.said = held["before"], held["said"]
        if other:
            self.note()
        found = list(self.path.glob("checkpoints/checkpoint-*"))
        whole = [each for each in found if (each / COMPLETE).exists()]
        if first_process():
            for each in set(found) - set(whole):
                shutil.rmtree(each)
        return max(whole, key=lambda each: int(each.name.rpartition("-")[2]), default=None)

    def _is_longer(self, held: dict[str, Any]) -> bool:
        """Whether the run differs from the one that is held in having more steps, or more epochs, alone.

        Raises:
            BadInput: it has, but its method follows a schedule of the whole length.
        """
        mine: dict[str, Any] = self._run["training"]
        changed = [name for name in mine if mine[name] != held.get(name)]
        if len(changed) != 1 or changed[0] not in ("steps", "epochs"):
            return False
        before, now = held[changed[0]], mine[changed[0]]
        if before is None or now is None or now < before:
            return False
        if self.method is not None and self.method.tags.scheduled:
            raise BadInput(f"{self.method.name} follows a schedule over all steps, so a run with it cannot get longer")
        return True

    def note(self) -> None:
        """Write down what is known of the run, so that it can go on from here."""
        if first_process():
            known = {"run": self._run, "before": self.before, "said": self.said}
            write_text(self.path / RUN, json.dumps(known, indent=2) + "\n")


class Keeper(transformers.TrainerCallback):
    """Notes the first scores, and marks checkpoints that are written to their end."""

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
            write_text(Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE, "")


def plain(metrics: dict[str, float]) -> dict[str, float]:
    """Return the Trainer's scores, without what it says of the clock."""
    clock = ("runtime", "per_second", "model_preparation_time")
    scores = {name: value for name, value in metrics.items() if name.startswith("eval_") and not name.endswith(clock)}
    return {name.removeprefix("eval_"): value for name, value in scores.items()}
