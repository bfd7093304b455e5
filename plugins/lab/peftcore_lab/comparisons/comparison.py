"""The schema of a comparison: a training run, but with several configurations of methods, and with several seeds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from peftcore.models.model_names import MODEL
from peftcore_lab.runs.reading import validated
from peftcore_lab.runs.run import MethodChoice, Options, Run, Training


class Candidate(MethodChoice):
    """One configuration of a method."""

    label: str | None = None
    """Name of the configuration in the report; by default the method's name."""
    learning_rate: PositiveFloat | None = None
    """Learning rate of this configuration, instead of that of `training`."""

    @property
    def called(self) -> str:
        return self.label or self.name


class Comparison(Options):
    """A comparison: a run of `train`, but with several methods and seeds."""

    model: str = Field(description=MODEL)
    task: str = "text-classification"
    """The task: text-classification, causal-lm, chat ..."""
    data: dict[str, Any]
    """Where the examples are, and the options of the task about them."""
    methods: list[Candidate] = Field(min_length=1)
    """Names, or ``{name: lora, rank: 8, learning_rate: 2e-3, label: small}``; ``full`` is full fine-tuning."""
    seeds: list[NonNegativeInt] = Field(default=[0], min_length=1)
    """Seeds; each method is trained with each of them."""
    tune_lr: list[PositiveFloat] = Field(default_factory=list)
    """Learning rates to try for each method, scored on a tuning set. Then each method is trained with its best rate."""
    tuning: str | None = None
    """Other examples for choosing learning rates; without them, a part of the training examples is used."""
    tuning_size: PositiveInt | None = None
    """Number of training examples that are held out for choosing learning rates (a fifth, at most 1,000, unless
    set)."""
    training: Training = Field(default_factory=lambda: Training.model_validate({"steps": 100}))
    together: PositiveInt = 1
    """How many runs train at once on one model, if they differ only in method, options and learning rate. The reported
    seconds and memory are then those of all these runs, divided by their number."""
    checkpoints: bool = False
    """Write checkpoints during a run, so that ``--resume`` can continue an interrupted run. Runs that train together
    write none."""
    dtype: str = "float32"
    """Dtype of the base's weights in memory."""
    quantize: str | None = None
    """A scheme that quantizes the base's weights before training: nf4, int8, bnb-nf4 ..."""
    out: Path = Path("peftcore-compare")
    """Folder for the report, and for a folder of each run."""

    @property
    def runs(self) -> int:
        """The number of runs, including those that choose learning rates."""
        return len(self.methods) * (len(self.seeds) + len(self.tune_lr))

    @field_validator("tune_lr", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [each.strip() for each in value.split(",") if each.strip()] if isinstance(value, str) else value

    @field_validator("methods", mode="before")
    @classmethod
    def _by_name_alone(cls, value: Any) -> Any:
        listed = value.split(",") if isinstance(value, str) else value
        if not isinstance(listed, list):
            return listed
        return [{"name": each.strip()} if isinstance(each, str) else each for each in listed if each]

    def run(self, candidate: Candidate, seed: int) -> Run:
        """Return the run of one trial. Its score is that after the last step, since choosing the best checkpoint by the
        validation set would bias the score."""
        written = "last" if self.checkpoints and self.together == 1 else False
        training = self.training.model_dump() | {"seed": seed, "checkpoints": written}
        if candidate.learning_rate is not None:
            training["learning_rate"] = candidate.learning_rate
        folder = re.sub(r"[^\w.-]+", "-", candidate.called) + (f"-{seed}" if len(self.seeds) > 1 else "")
        shared = self.model_dump(include={"model", "task", "data", "dtype", "quantize"})
        method = {"name": candidate.name, **candidate.arguments}
        whole = {**shared, "method": method, "training": training, "out": self.out / "runs" / folder}
        return validated(Run, whole, candidate.called)
