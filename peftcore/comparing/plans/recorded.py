"""A method as the user asks for it, and what it would do to a model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

import peftcore
from peftcore.comparing.quiet import unlogged
from peftcore.contract.config import MethodConfig, validate_json
from peftcore.contract.method import Method
from peftcore.injection.applying import prepare, wishes_of
from peftcore.surgery.planning import Plan
from peftcore.surgery.surgeon import Graft, Surgeon
from peftcore.targets.resolver import Target


@dataclass(frozen=True)
class Wanted:
    """A method as the user asks for it."""

    method: str
    options: Mapping[str, Any]
    target: Target | None = None
    exclude: Target | None = None
    train: Sequence[str] = ()

    def resolved(self) -> tuple[type[Method], MethodConfig]:
        """The method and its options, checked; lists stand for tuples, as in files."""
        cls = peftcore.method(self.method)
        return cls, validate_json(cls.Config, json.dumps(dict(self.options)))

    def on(self, model: nn.Module) -> Surgeon:
        """What the method does to the model; recorded, not done."""
        cls, config = self.resolved()
        wishes = wishes_of(self.target, self.exclude, tuple(self.train), 0, None)
        return prepare(model, cls(), config, wishes, None, dry=True)


@dataclass(frozen=True)
class Place:
    """One place at which the method acts."""

    name: str
    """Its path, in a hybrid with the part's number in front; or the name of what several places share."""
    path: str
    """Of the module or bare parameter."""
    shape: tuple[int, ...]
    role: str | None
    tensors: Mapping[str, tuple[int, ...]]
    """What is saved of it."""
    trainable: int
    rows: bool = False
    """Whether these are some rows of a fused weight only: those of the role."""

    @classmethod
    def of(cls, name: str, operator: nn.Module) -> Place:
        """What a module holds that several places share."""
        tensors = {key: tuple(each.shape) for key, each in operator.state_dict().items()}
        return cls(name, "", (), None, tensors, sum(parameter.numel() for parameter in operator.parameters()))

    @classmethod
    def of_graft(cls, graft: Graft) -> Place:
        site = graft.site
        shape = tuple(site.weight_shape) if site.layer.has(site.module, site.tensor) else ()
        path = site.path.partition(":")[0]
        held = cls.of(graft.key, graft.operator)
        return replace(held, path=path, shape=shape, role=site.role, rows=site.slices is not None)

    def as_dict(self) -> dict[str, Any]:
        return {
            "path": self.name,
            "role": self.role,
            "weight": list(self.shape),
            "tensors": {name: list(shape) for name, shape in self.tensors.items()},
            "trainable": self.trainable,
        }


@dataclass(frozen=True)
class Recorded:
    """What a method would do to a model."""

    surgeon: Surgeon
    plan: Plan
    places: tuple[Place, ...]
    shared: tuple[Place, ...]
    notes: tuple[str, ...]
    """What peftcore warns of."""

    @classmethod
    def of(cls, wanted: Wanted, model: nn.Module) -> Recorded:
        """Plan it.

        Raises: UnknownMethod, ConfigError, TargetError, UnsupportedSite: it cannot be.
        """
        with unlogged(), warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            surgeon = wanted.on(model)
        shared = [(f"shared:{name}", each.module) for name, each in surgeon.owned.items()]
        return cls(
            surgeon=surgeon,
            plan=Plan.of(surgeon),
            places=tuple(map(Place.of_graft, surgeon.grafts)),
            shared=tuple(Place.of(name, module) for name, module in shared),
            notes=tuple(str(each.message) for each in heard if each.category is UserWarning),
        )

    @property
    def name(self) -> str:
        return self.surgeon.method.name

    @property
    def options(self) -> dict[str, Any]:
        """Those that are not as by default."""
        return self.surgeon.config.model_dump(mode="json", exclude={"method"}, exclude_defaults=True)

    def operators(self) -> list[nn.Module]:
        """All that has tensors of the method."""
        return [graft.operator for graft in self.surgeon.grafts] + [each.module for each in self.surgeon.owned.values()]

    def as_dict(self) -> dict[str, Any]:
        return {
            "method": self.name,
            "options": self.options,
            "sites": [place.as_dict() for place in self.places],
            "shared": [place.as_dict() for place in self.shared],
            "trainable": self.plan.trainable,
            "total": self.plan.total,
            "share": self.plan.share,
        }
