"""The search space of ``peftcore search``: methods, the values of their options, the sites by role and depth, and
learning rates.

An option of a method is given as a value, a list of values to choose from, or ``{low: ..., high: ..., log: true}``. In
addition to the method's options there are ``target`` and ``exclude`` (as in `peftcore.apply`), ``depth`` (the share of
the layers that are adapted, counted from the last layer) and ``learning_rate``. The value ``null`` leaves an option
out.
"""

from __future__ import annotations

import difflib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import optuna
from pydantic import ValidationError, model_validator

import peftcore
from peftcore.author import Method
from peftcore.errors import BadInput, shown
from peftcore.roles import HostMap
from peftcore_lab.comparisons.comparison import Candidate
from peftcore_lab.runs.reading import validated
from peftcore_lab.runs.run import Options

DEPTH, RATE = "depth", "learning_rate"
SITES = ("target", "exclude", "train")
SIZES: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "rank": (1, 2, 4, 8, 16, 32),
        "bottleneck": (1, 2, 4, 8, 16, 32, 64),
        "length": (1, 5, 10, 20),
    }
)
"""Options that determine the size of an adapter, by their names (the same in all methods), and the values to try."""
PLACES: tuple[Any, ...] = (None, "attn.*", "mlp.*", "all-linear")
"""Targets to try for methods that change matrices; None is the default target of the method."""
DEPTHS = (1.0, 0.5, 0.25)
METHODS = ("bitfit", "ln_tuning", "ia3", "lora", "dora", "houlsby_adapter")
"""Methods to try if the user names none: small ones that work on most models."""


@dataclass(frozen=True)
class SearchPoint:
    """One point of the space."""

    method: str
    values: Mapping[str, Any]
    """The options, the target and the depth; options that are left out are not included."""
    learning_rate: float

    def __str__(self) -> str:
        return " ".join([self.method, *(f"{name}={spelled(value)}" for name, value in self.values.items())])

    def candidate(self, host: HostMap, label: str | None = None) -> Candidate:
        """Return the candidate to train. The depth is converted to a list of excluded layers."""
        values = dict(self.values)
        above = first_layers(host, values.pop(DEPTH, 1.0))
        if above:
            own = values.get("exclude", [])
            values["exclude"] = [*([own] if isinstance(own, str) else own), *above]
        return Candidate(name=self.method, label=label, learning_rate=self.learning_rate, **values)


def spelled(value: Any) -> str:
    """Return a value as a text for the command line or a table."""
    return "+".join(map(str, value)) if isinstance(value, list) else f"{value:g}" if _number(value) else str(value)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def first_layers(host: HostMap, depth: float) -> list[str]:
    """Return globs for the first layers of each stack, which are to be excluded so that the share `depth` of the layers
    remains."""
    stacks: dict[str, dict[int, str]] = {}
    for entry in host.entries:
        if entry.block is not None and entry.layer is not None:
            stacks.setdefault(entry.block.rpartition(".")[0], {})[entry.layer] = entry.block
    found = []
    for layers in stacks.values():
        ordered = [layers[number] for number in sorted(layers)]
        found += [f"{block}.*" for block in ordered[: len(ordered) - math.ceil(depth * len(ordered))]]
    return found


class Domain(ABC):
    """The values that one option may take."""

    @abstractmethod
    def suggest(self, trial: optuna.trial.Trial, name: str) -> Any:
        """Return the sampler's suggestion."""

    @abstractmethod
    def encoded(self, value: Any) -> Any:
        """Return the value as the study stores it; None if the value is not in the domain."""

    @abstractmethod
    def ends(self) -> list[Any]:
        """Return candidate values for the smallest adapter: the ends of the range, or all listed values."""


@dataclass(frozen=True)
class OneOf(Domain):
    """A list of values. They may be lists or texts too, since optuna gets each value as JSON."""

    values: tuple[Any, ...]

    def suggest(self, trial: optuna.trial.Trial, name: str) -> Any:
        return json.loads(trial.suggest_categorical(name, [json.dumps(each) for each in self.values]))

    def encoded(self, value: Any) -> Any:
        return json.dumps(self.values[self.values.index(value)]) if value in self.values else None

    def ends(self) -> list[Any]:
        return list(self.values)


class Range(Options):
    """The numbers between two bounds. If both bounds are integers, so are the numbers."""

    low: int | float
    high: int | float
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.low > self.high or (self.log and self.low <= 0):
            raise ValueError("low must be below high" + (", and above 0 for log" if self.log else ""))
        return self


@dataclass(frozen=True)
class Between(Domain):
    """The domain of a range of numbers."""

    range: Range

    @property
    def whole(self) -> bool:
        return isinstance(self.range.low, int) and isinstance(self.range.high, int)

    def suggest(self, trial: optuna.trial.Trial, name: str) -> Any:
        suggest: Any = trial.suggest_int if self.whole else trial.suggest_float
        return suggest(name, self.range.low, self.range.high, log=self.range.log)

    def encoded(self, value: Any) -> Any:
        fits = _number(value) and self.range.low <= value <= self.range.high and (not self.whole or value == int(value))
        return value if fits else None

    def ends(self) -> list[Any]:
        return [self.range.low, self.range.high]


def domain(value: Any, where: str) -> Domain:
    """Return the domain that a file describes: a range, a list to choose from, or one value.

    Raises:
        BadInput: the list is empty, or the range is invalid.
    """
    if isinstance(value, dict) and value.keys() & {"low", "high"}:
        return Between(validated(Range, value, where))
    values = tuple(value) if isinstance(value, list) else (value,)
    if not values:
        raise BadInput(f"{where}: the list is empty, so there is nothing to choose from")
    return OneOf(values)


class Space:
    """The search space: the methods, and the domains of their options.

    Args:
        methods: for each method its options, as in a configuration file.
        learning_rate: the learning rates for methods whose options do not set them.

    Raises:
        BadInput, UnknownMethod: a method or an option is wrong. The error names it.
    """

    def __init__(self, methods: Mapping[str, Mapping[str, Any]], learning_rate: Any) -> None:
        if not methods:
            raise BadInput("methods: the space is empty; name at least one, such as methods: {lora: {rank: [1, 2, 4]}}")
        self.methods = {name: checked(name, {RATE: learning_rate, **given}) for name, given in methods.items()}

    def without(self, names: set[str]) -> None:
        """Remove some methods from the space."""
        self.methods = {name: options for name, options in self.methods.items() if name not in names}

    def suggest(self, trial: optuna.trial.Trial) -> SearchPoint:
        """Return the point that the study's sampler suggests for a trial."""
        method = trial.suggest_categorical("method", list(self.methods))
        options = self.methods[method]
        values = {name: each.suggest(trial, f"{method}.{name}") for name, each in options.items()}
        return _choice(method, values)

    def parameters(self, start: Candidate) -> dict[str, Any]:
        """Return a configuration as the study stores it. Missing options have their default values.

        Raises:
            BadInput: the configuration is not in the space.
        """
        options = self.methods.get(start.name)
        if options is None:
            raise BadInput(f"start: {start.name} is not one of the methods: {', '.join(self.methods)}")
        told = {**defaults(peftcore.method(start.name)), **start.arguments, RATE: start.learning_rate}
        stray = sorted(start.arguments.keys() - options.keys())
        found = {name: each.encoded(told.get(name)) for name, each in options.items()}
        stray += [name for name, value in found.items() if value is None]
        if stray:
            raise BadInput(f"start: {start.name} with {stray[0]}={shown(told.get(stray[0]))} is not in the space")
        return {"method": start.name, **{f"{start.name}.{name}": value for name, value in found.items()}}

    def smallest(self, method: str, cost: Callable[[SearchPoint], float]) -> SearchPoint:
        """Return the cheapest point of a method. It is found by minimizing the cost over one option after the other."""
        options = self.methods[method]
        values = {name: each.ends()[0] for name, each in options.items()}
        for name, each in options.items():
            if name != RATE:
                tried = [{**values, name: value} for value in each.ends()]
                values = min(tried, key=lambda point: cost(_choice(method, point)))
        return _choice(method, values)


def _choice(method: str, values: Mapping[str, Any]) -> SearchPoint:
    given = {name: value for name, value in values.items() if value is not None and name != RATE}
    return SearchPoint(method, given, values[RATE])


def defaults(cls: type[Method]) -> dict[str, Any]:
    """Return the default values of a method's options. Required options are left out."""
    fields = cls.Config.model_fields
    own = {name: each.get_default(call_default_factory=True) for name, each in fields.items() if not each.is_required()}
    return {DEPTH: 1.0, **own}


def checked(method: str, given: Mapping[str, Any]) -> dict[str, Domain]:
    """Return the domains of a method's options, after checking that the method accepts the values.

    Raises:
        BadInput, UnknownMethod: the method, an option or a value is wrong. The error names it.
    """
    cls = peftcore.method(method)
    fields = [name for name in cls.Config.model_fields if name != "method"]
    known = [*fields, *SITES, DEPTH, RATE]
    found = {}
    for name, value in given.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}"
            raise BadInput(f"{method} has no option {name!r}; {hint}")
        found[name] = domain(value, f"{method}.{name}")
        for each in found[name].ends():
            wrong = refused(cls, name, each)
            if wrong:
                raise BadInput(f"{method}: {name}={shown(each)}: {wrong}")
    return found


def refused(cls: type[Method], name: str, value: Any) -> str | None:
    """Return the reason why an option cannot have a value (with all other options at their defaults), or None."""
    if name == DEPTH and not (_number(value) and 0 < value <= 1):
        return "a share of the layers: above 0, at most 1"
    if name == RATE and not (_number(value) and value > 0):
        return "a number above 0"
    if name in (*SITES, DEPTH, RATE) or value is None:
        return None
    try:
        cls.Config.model_validate_json(json.dumps({name: value}))
    except ValidationError as error:
        return next((each["msg"] for each in error.errors() if each["loc"][:1] in ((name,), ())), None)
    return None


def by_default(name: str, layered: bool) -> dict[str, Any]:
    """Return the search space of a method for which the user sets no options. It contains the options for the adapter's
    size, the target if the method can act at any matrix, and the depth if it acts in layers.

    Raises:
        UnknownMethod: the name is unknown.
    """
    cls = peftcore.method(name)
    space: dict[str, Any] = {}
    for option, values in SIZES.items():
        if option in cls.Config.model_fields and not refused(cls, option, values[-1]):
            space[option] = [each for each in values if not refused(cls, option, each)]
    if cls.tags.mergeable and "attn.q" in cls.target:
        space["target"] = list(PLACES)
    if layered:
        space[DEPTH] = list(DEPTHS)
    return space
