"""What a run of ``peftcore train`` is told: a YAML file, flags over it, one schema for both."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from peftcore.cli.errors import BadInput
from peftcore.contract.config import described
from peftcore.errors import shown

B = TypeVar("B", bound=BaseModel)


class Options(BaseModel):
    """Typed, immutable, and nothing unknown; docstrings under fields become the descriptions of the schema."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class MethodChoice(BaseModel):
    """A method by name. All else belongs to it, or to `peftcore.apply`: ``target``, ``exclude``, ``overrides``."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Training(Options):
    """How long, how fast, and what is written on the way. Steps are those of the optimizer."""

    steps: PositiveInt | None = None
    """Optimizer steps; instead of `epochs`."""
    epochs: PositiveFloat | None = None
    """Passes over the data (3)."""
    batch_size: PositiveInt = 8
    """Examples that a device takes at once."""
    accumulate: PositiveInt = 1
    """Batches that make one step."""
    learning_rate: PositiveFloat = 1e-3
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    """What becomes of the learning rate after the warm-up."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """The share of all steps in which the learning rate rises."""
    weight_decay: NonNegativeFloat = 0.0
    clip: PositiveFloat = 1.0
    """The largest norm of all gradients together."""
    seed: NonNegativeInt = Field(0, lt=2**32)
    """Of what is newly initialised, the order of the data, and dropout."""
    autocast: bool = False
    """Compute in bfloat16 where torch's autocast does."""
    checkpoint_gradients: bool = False
    """Keep no activations inside blocks, and run these again in backward."""
    group_by_length: bool = False
    """Let examples of similar length share a batch: less padding, and less chance in the order."""
    evaluate_every: PositiveFloat = 0.1
    """Steps between scores, and between checkpoints; below 1, a share of all steps."""
    checkpoints: bool = True
    """Write some, and end with the best; otherwise nothing is written before the end, which is the last step."""
    patience: PositiveInt | None = None
    """Stop after this many scores without a better one."""
    shard: bool = False
    """Cut the weights over the processes that share the run (FSDP2), so that none holds all of them."""
    workers: NonNegativeInt = 0
    """Processes that prepare batches."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        if self.patience is not None and not self.checkpoints:
            raise ValueError("patience goes back to the best checkpoint: leave checkpoints on")
        return self


class Run(Options):
    """One training run: what a configuration file holds."""

    model: str
    """Folder of a model with its tokenizer or image processor, a GGUF file, ``package:NAME`` for what an installed
    Python package holds, or a name on the Hub."""
    task: str
    """What is learned: text-classification, causal-lm, chat ..."""
    data: dict[str, Any]
    """Where the examples are, and what the task has to know of them."""
    method: MethodChoice
    """``lora``, or ``{name: lora, rank: 8}``."""
    training: Training = Field(default_factory=lambda: Training.model_validate({}))
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the base's weights in memory."""
    quantize: str | None = None
    """A scheme that packs the base's weights before anything is trained: nf4, int8, bnb-nf4 ..."""
    out: Path = Path("peftcore-run")
    """Folder for the adapter, checkpoints, logs and metrics."""

    @field_validator("method", mode="before")
    @classmethod
    def _by_name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML 1.1 takes ``1e-3`` for text; people mean the number."""


POWERS = re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", POWERS, list("-+0123456789"))


def parse(text: str, where: object) -> Any:
    """YAML, of plain values only.

    Raises:
        BadInput: it is no YAML.
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise BadInput(f"{where}: not YAML: {' '.join(str(error).split())}") from None


def load(path: Path) -> dict[str, Any]:
    """The names and values of a YAML file.

    Raises:
        BadInput: it cannot be read.
    """
    try:
        values = parse(path.read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read ({error})") from None
    if not isinstance(values, dict):
        raise BadInput(f"{path}: must hold names and values, such as 'model: FOLDER'")
    return values


def read(kind: type[B], values: dict[str, Any], changes: Iterable[tuple[str, Any]], where: str = "the options") -> B:
    """What a file says, with some values set by their dotted name.

    Raises:
        BadInput: a value is wrong: all of them are named.
    """
    for name, value in changes:
        _put(values, name, value)
    return validated(kind, values, where)


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    *groups, last = name.split(".")
    for group in groups:
        inner = values.setdefault(group, {})
        if group == "method" and isinstance(inner, str):
            inner = values[group] = {"name": inner}
        if not isinstance(inner, dict):
            raise BadInput(f"{name}: {group} is {shown(inner)} and has no parts")
        values = inner
    held = values.get(last)
    if last == "method" and isinstance(held, dict) and isinstance(value, str):
        value = {**held, "name": value}
    values[last] = value


def validated(kind: type[B], values: Any, where: str) -> B:
    """The values as options of a kind.

    Raises:
        BadInput: naming every value that is wrong, and names that are close to unknown ones.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        wrong = [f"{where}: {_wrong(kind, each)}" for each in described(error)]
        raise BadInput("\n".join(wrong)) from None


def _wrong(kind: type[BaseModel], each: dict[str, Any]) -> str:
    place = ".".join(str(part) for part in each["loc"])
    if each["type"] == "missing":
        return f"{place} is missing"
    if each["type"] == "extra_forbidden":
        known = _options(kind, each["loc"][:-1])
        close = difflib.get_close_matches(str(each["loc"][-1])[:100], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}"
        return f"there is no option {shown(place)}; {hint}"
    return f"{place}={shown(each['input'])}: {each['msg']}" if place else each["msg"]


def _options(kind: type[BaseModel], path: Iterable[Any]) -> list[str]:
    for part in path:
        inner = kind.model_fields[part].annotation
        assert isinstance(inner, type) and issubclass(inner, BaseModel)
        kind = inner
    return list(kind.model_fields)
