"""What a method is: a final subclass of `Method` with a name, a `Config`, `Tags`, default targets by role, and
`inject`."""

from __future__ import annotations

import fnmatch
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import to_json
from torch import Tensor, nn

from peftcore.errors import PluginError, shown

if TYPE_CHECKING:
    from peftcore.injection import Injection
    from peftcore.sites import Site
    from peftcore.surgery import Surgeon
    from peftcore.training.batches import Batches
    from peftcore.training.optimizer import GradientRule

CATEGORIES = (
    "additive",
    "reparameterized",
    "selective",
    "hybrid",
    "quantized",
    "multitask",
    "vision",
    "diffusion",
)
"""The categories of the survey arXiv 2410.19878; a plugin of ours for each."""

SOURCES = re.compile(r"(?:(?:[A-Za-z][\w.-]* \d+(?:\.\d+)*|the authors' code)(?:, (?=.)|$))*")
"""What `Tags.checked_against` may be: a library has a version, and an equation has none."""

RESERVED = frozenset(
    {"model", "name", "target", "exclude", "train", "data", "seed", "dtype", "host", "trainable", "active", "strict"}
)
"""Argument names of `apply` and `load`: no method option may be called so."""


MAX_OVERRIDES = 10_000
MAX_GLOBS = 100_000
"""Characters in all of them that have wildcards: each is tried on many paths."""


def fits(value: Any) -> bool:
    """False for numbers that tensors cannot be computed with: whole ones of more than 64 bits, and others near the end
    of float32 (infinities and NaN are for others to refuse)."""
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return not isinstance(value, float) or abs(value) <= 1e30 or not math.isfinite(value)


def _is_glob(pattern: str) -> bool:
    return any(sign in pattern for sign in "*?[")


def matches(path: str, pattern: str) -> bool:
    """Whether a glob of `MethodConfig.overrides` means a site."""
    return fnmatch.fnmatchcase(path, pattern) if _is_glob(pattern) else path == pattern


class MethodConfig(BaseModel):
    """Options of one method: typed, strict, immutable; unknown keys are refused. Docstrings under fields become schema
    descriptions."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    method: str
    """Name of the method these options belong to."""
    overrides: dict[str, dict[str, Any]] = Field(default_factory=dict, max_length=MAX_OVERRIDES)
    """Other options for some sites: ``{"*.layers.0.*": {"rank": 16}}``. Keys are globs for site paths; the first that
    matches counts."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        taken = RESERVED.intersection(cls.model_fields)
        if taken:
            raise PluginError(
                f"{cls.__name__}: {', '.join(sorted(taken))} are arguments of apply and cannot be options"
            )

    @model_validator(mode="after")  # one before reads the JSON, and lists stand for tuples no longer
    def _numbers(self) -> Self:
        left: list[Any] = [getattr(self, name) for name in type(self).model_fields]
        while left:
            each = left.pop()
            if isinstance(each, dict):
                left += each.values()
            elif isinstance(each, list | tuple):
                left += each
            elif not isinstance(each, str) and not fits(each):
                raise ValueError(f"no tensor can be computed with a number like {shown(each)}")
        return self

    @field_validator("overrides")
    @classmethod
    def _globs(cls, overrides: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        if sum(len(each) for each in overrides if _is_glob(each)) > MAX_GLOBS:
            raise ValueError(f"their globs have more than {MAX_GLOBS:,} characters")
        return overrides

    def replace(self, **changes: Any) -> Self:
        """A copy with some options changed, checked like a new one.

        Raises:
            ConfigError: an option is unknown or its value breaks a rule.
        """
        from peftcore.config import validate

        return validate(type(self), {**self.model_dump(exclude=set(changes)), **changes})

    def at(self, path: str) -> Self:
        """The options for the site at `path`: `overrides` applied.

        Raises:
            ConfigError: an override has an unknown option, or a value that breaks a rule.
        """
        for pattern, changes in self.overrides.items():
            if matches(path, pattern):
                from peftcore.config import validate_json

                options = {**self.model_dump(), **changes, "overrides": {}}
                # By way of JSON: what a file holds for a tuple is a list, and means the same.
                return validate_json(type(self), to_json(options, inf_nan_mode="constants", fallback=repr))
        return self


@dataclass(frozen=True)
class Tags:
    """What a method can do. Declared here, proven by the conformance kit: claiming too much and claiming too little
    both fail."""

    category: str
    """One of `CATEGORIES`."""
    paper: str
    """arXiv number of the paper that defines the method, or another reference."""
    mergeable: bool = False
    """The effect can be folded into the host's tensors; `merge` then gives the same outputs."""
    identity_at_init: bool = True
    """A fresh injection with default options leaves the host's outputs unchanged, up to rounding."""
    identity_options: Mapping[str, Any] | None = None
    """Where a fresh injection changes outputs, as the paper has it: the options with which it does not."""
    per_row: bool = True
    """Rows of a batch may go to different injections (`route`)."""
    low_rank: bool = False
    """`factors()` of every operator gives the update as A, B and a scale."""
    needs_data: bool = False
    """`calibrate` looks at the user's data before training; `apply` then wants ``data=``."""
    scheduled: bool = False
    """`on_step` changes the adapter while it trains, so whoever steps must know how many steps there will be."""
    checked_against: str = ""
    """Whose numbers its tests compare with, separated by commas: libraries with their versions (``"peft 0.21"``), or
    ``"the authors' code"``. Empty where there are none, only the equation, written a second time."""

    @property
    def proven(self) -> bool:
        """Independent numbers exist. A method that is not proven is experimental: its tests have the equation alone."""
        return bool(self.checked_against)


@dataclass(frozen=True)
class MethodInfo:
    """One line of `methods()`; reading it imports no method module beyond the method's own."""

    name: str
    """The name by which `apply` finds the method."""
    plugin: str
    """The plugin's name: of two methods of one name, ``"plugin/name"`` says which."""
    distribution: str
    """Distribution and version that bring the method, or "registered at run time"."""
    location: str = field(repr=False)
    """``module:Class``."""
    aliases: tuple[str, ...] = ()
    """Other names of the method."""

    def _tags(self) -> Tags:
        from peftcore.catalogue import method

        return method(f"{self.plugin}/{self.name}").tags

    @property
    def tags(self) -> Tags:
        """The declared capabilities (imports the method's module)."""
        return self._tags()

    @property
    def category(self) -> str:
        """The survey's category (imports the method's module)."""
        return self._tags().category

    @property
    def paper(self) -> str:
        """Reference of the defining paper (imports the method's module)."""
        return self._tags().paper

    @property
    def mergeable(self) -> bool:
        """`Tags.mergeable` (imports the method's module)."""
        return self._tags().mergeable

    @property
    def per_row(self) -> bool:
        """`Tags.per_row` (imports the method's module)."""
        return self._tags().per_row

    @property
    def needs_data(self) -> bool:
        """`Tags.needs_data` (imports the method's module)."""
        return self._tags().needs_data

    @property
    def checked_against(self) -> str:
        """`Tags.checked_against` (imports the method's module)."""
        return self._tags().checked_against

    @property
    def proven(self) -> bool:
        """`Tags.proven` (imports the method's module)."""
        return self._tags().proven

    @property
    def budgets(self) -> Mapping[str, int]:
        """Values that train with default options, by name of the reference hosts that the method has a place in.

        Plans on the meta device, for those of transformers and diffusers that are installed; takes a second or two.
        """
        from peftcore.references import budgets

        return budgets(f"{self.plugin}/{self.name}")


class Method(ABC):
    """A method. Subclasses are final: variants are options only where the paper's own code has them as options."""

    name: ClassVar[str]
    """The name by which `apply` and files find it."""
    aliases: ClassVar[tuple[str, ...]] = ()
    """Other names."""
    Config: ClassVar[type[MethodConfig]]
    """Its options."""
    tags: ClassVar[Tags]
    """What it can do."""
    target: ClassVar[str | tuple[str, ...]]
    """Default targets, by role, so that one line serves every architecture; roles that a host lacks are passed over."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if Method not in cls.__bases__:
            raise PluginError(f"{cls.__name__} subclasses another method; methods are final, share functions instead")

    config_version: ClassVar[int] = 1
    """Raised when options change their meaning; `migrate` then upgrades old ones."""

    @abstractmethod
    def inject(self, model: nn.Module, config: Any, surgeon: Surgeon) -> None:
        """Say which operators stand where, through the surgeon's verbs. Nothing changes before it returns.

        Args:
            model: the host, as it came.
            config: the method's own `Config`.
            surgeon: finds sites and records what is to stand there.

        Raises:
            ConfigError: options that do not go together, or not with this host.
            TargetError: there is nothing to act on.
            UnsupportedSite: what the target means is nothing that the method can act on.
        """

    def trainable(self, model: nn.Module, config: Any, injection: Injection) -> None:
        """What trains once injected: by default every parameter of the operators."""
        for parameter in injection.parameters():
            parameter.requires_grad = True

    def calibrate(self, model: nn.Module, data: Batches, config: Any, injection: Injection) -> None:
        """Look at data before training (tag `needs_data`). Runs once, in `apply`, when the operators stand and are
        active; never on loading, so what it finds goes into parameters or buffers of the operators.

        Gradients, training mode and `requires_grad` are put back afterwards.

        Raises:
            CalibrationError: the data does not tell what the method wants to know.
            PluginError: the method has the tag and no such function.
        """
        raise PluginError(f"{self.name} has the tag needs_data and does not define calibrate")

    def on_step(self, injection: Injection, step: int, total: int) -> None:
        """Change the adapter after step 1, 2, …, `total` of the optimizer, while the gradients of that step are still
        there (tag `scheduled`). What is to survive a resumed training, and is of no use afterwards, goes into
        non-persistent buffers of the operators: the optimizer saves them.

        Raises:
            TrainingError: its schedule does not fit into `total` steps.
            PluginError: the method has the tag and no such function.
        """
        raise PluginError(f"{self.name} has the tag scheduled and does not define on_step")

    def aux_loss(self, injection: Injection) -> Tensor | None:
        """What is added to the host's loss in training, once a step: a tensor of shape ``[]``, or None."""
        return None

    def parameter_groups(self, injection: Injection, *, lr: float, **defaults: Any) -> list[dict[str, Any]]:
        """What trains, as the parameter groups of a torch optimizer; `defaults` are its other options. Parameters that
        train and are in no group (modules that the user named in ``train``) come in one more, with `lr`."""
        return [{"params": [p for p in injection.parameters() if p.requires_grad], "lr": lr, **defaults}]

    def gradient_rule(self, injection: Injection) -> GradientRule | None:
        """What happens to gradients before the optimizer sees them, and to its updates before they are applied."""
        return None

    @staticmethod
    @abstractmethod
    def parameter_count(site: Site, config: Any) -> int:
        """How many values the operator at one grafted site has, by the closed formula of the paper; the kit compares it
        with reality.

        Raises:
            ConfigError: the number is not said by the options of one site.
        """

    @classmethod
    def migrate(cls, options: dict[str, Any], version: int) -> dict[str, Any]:
        """Options of a file of `version`, as JSON has them, as those of ``version + 1``."""
        return options


def check_method_class(cls: Any) -> type[Method]:
    """The class, if it keeps the contract.

    Raises:
        PluginError: naming what is missing.
    """
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise PluginError(f"{cls!r} is not a subclass of peftcore.Method")
    for attribute, kind in (("name", str), ("tags", Tags), ("target", object), ("Config", type)):
        value = getattr(cls, attribute, None)
        if value is None or not isinstance(value, kind):
            raise PluginError(f"{cls.__name__} must define {attribute}")
    if not issubclass(cls.Config, MethodConfig):
        raise PluginError(f"{cls.__name__}.Config must subclass MethodConfig")
    if cls.tags.category not in CATEGORIES:
        raise PluginError(f"{cls.__name__}: unknown category {cls.tags.category!r}; one of {', '.join(CATEGORIES)}")
    if not SOURCES.fullmatch(cls.tags.checked_against):
        raise PluginError(
            f"{cls.__name__}: checked_against={cls.tags.checked_against!r} names nobody whose numbers there are; write "
            'a library with its version ("peft 0.21") or "the authors\' code", and nothing for the equation alone'
        )
    if cls.__abstractmethods__:
        raise PluginError(f"{cls.__name__} must implement {', '.join(sorted(cls.__abstractmethods__))}")
    return cls
