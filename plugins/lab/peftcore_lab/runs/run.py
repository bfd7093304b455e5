"""The schema of a training run, for the files and the flags of ``peftcore train``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from peftcore.files.save_load import describe
from peftcore.models.model_names import MODEL

FULL = "full"
"""The name of full fine-tuning, the reference method: every parameter of the model trains, and nothing is injected."""


class Options(BaseModel):
    """Base class of typed, immutable options; unknown names are refused. Docstrings under fields are the descriptions
    in the schema."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class MethodChoice(BaseModel):
    """The name of a method, and further keys: options of the method, or arguments of `peftcore.apply` (``target``,
    ``exclude``, ``overrides``)."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    name: str
    """Name of a method or preset; ``full`` trains every parameter of the model."""

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Training(Options):
    """Length and speed of training, and the files that are written during it. Steps are those of the optimizer."""

    steps: PositiveInt | None = None
    """Optimizer steps; instead of `epochs`."""
    epochs: PositiveFloat | None = None
    """Passes over the data; 3 by default."""
    batch_size: PositiveInt = 8
    """Examples in a batch on each device."""
    accumulate: PositiveInt = 1
    """Batches whose gradients are accumulated in one step."""
    learning_rate: PositiveFloat = 1e-3
    """The highest learning rate, after the warm-up."""
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    """Schedule of the learning rate after the warm-up."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """The share of all steps in which the learning rate rises."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of AdamW."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of moving averages of the trained parameters, such as 0.999. Scores, the best checkpoint and the saved
    adapter are those of the averages."""
    clip: PositiveFloat = 1.0
    """Maximum norm for gradient clipping, over all gradients together."""
    seed: NonNegativeInt = Field(0, lt=2**32)
    """Seed of newly initialised parameters, the order of the data, and dropout."""
    autocast: bool = False
    """Compute in bfloat16 where torch's autocast does."""
    checkpoint_gradients: bool = False
    """Do not store activations inside blocks, and run the blocks again in backward (gradient checkpointing)."""
    group_by_length: bool = False
    """Put examples of similar length into the same batch. There is less padding, and the order is less random."""
    evaluate_every: PositiveFloat = 0.1
    """Steps between two evaluations, and between two checkpoints. A number below 1 is a share of all steps."""
    checkpoints: bool | Literal["last"] = True
    """``true`` writes checkpoints, and the result is the best one. ``last`` writes checkpoints to resume from, and the
    result is the last step. ``false`` writes no checkpoints, and the result is the last step."""
    patience: PositiveInt | None = None
    """Stop after this many scores without a better one."""
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Where losses and scores are logged; TensorBoard's files are in the run's folder."""
    shard: bool = False
    """Shard the weights over the processes of the run (FSDP2), so that no process stores all weights."""
    workers: NonNegativeInt = 0
    """Processes that prepare batches."""

    @field_validator("report_to", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return [each for each in re.split(r"[\s,]+", value) if each != "none"] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("set steps or epochs, not both")
        if self.patience is not None and self.checkpoints is not True:
            raise ValueError("patience restores the best checkpoint: set checkpoints=true, or remove patience")
        return self


class Run(Options):
    """One training run: the content of a configuration file."""

    model: str = Field(description=MODEL)
    task: str
    """The task: text-classification, causal-lm, chat ..."""
    data: dict[str, Any]
    """Where the examples are, and the options of the task about them."""
    method: MethodChoice
    """``lora``, or ``{name: lora, rank: 8}``. If `adapter` is set, the method is that of the adapter."""
    adapter: str | None = None
    """An existing adapter to continue, instead of a new one: a folder, a file, or a name on the Hub. Its method,
    options and target modules are used."""
    training: Training = Field(default_factory=lambda: Training.model_validate({}))
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the base's weights in memory."""
    quantize: str | None = None
    """A scheme that quantizes the base's weights before training: nf4, int8, bnb-nf4 ..."""
    out: Path = Path("peftcore-run")
    """Folder for the adapter, checkpoints, logs and metrics."""

    @model_validator(mode="before")
    @classmethod
    def _of_the_file(cls, values: Any) -> Any:
        """Return the values with the method of the adapter.

        Raises:
            ValueError: the adapter cannot be read, or another method is set.
        """
        if not isinstance(values, dict) or values.get("adapter") is None:
            return values
        found = describe(str(values["adapter"]))
        if found.problem or len(found.methods) != 1:
            raise ValueError(f"adapter={values['adapter']}: {found.problem or 'it is not one adapter of one method'}")
        method = {"name": found.methods[0]}
        if values.get("method", method) not in (method, method["name"]):
            raise ValueError(f"adapter={values['adapter']} is already a {method['name']}: remove method")
        return {**values, "method": method}

    @field_validator("method", mode="before")
    @classmethod
    def _by_name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value
