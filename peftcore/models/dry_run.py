"""Records the changes that a method would make to a model, without making them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

import peftcore
from peftcore.contract.config import MethodConfig, validate_json
from peftcore.contract.method import Method
from peftcore.contract.operators import trainable_numbers
from peftcore.contract.surgeon_protocol import Graft, Wishes
from peftcore.injection.applying import plan_of, record
from peftcore.injection.request import Request
from peftcore.surgery.planning import Plan
from peftcore.surgery.surgeon import RecordingSurgeon
from peftcore.targets.resolver import Target
from peftcore.utils.quiet import unlogged


@dataclass(frozen=True)
class RequestedMethod:
    """A method and its options, as the user requested them."""

    method: str
    options: Mapping[str, Any]
    target: Target | None = None
    exclude: Target | None = None
    train: Sequence[str] = ()

    def resolved(self) -> tuple[type[Method], MethodConfig]:
        """Return the method and its options, validated; lists are accepted for tuples, as in files."""
        cls = peftcore.method(self.method)
        return cls, validate_json(cls.Config, json.dumps(dict(self.options)))

    def on(self, model: nn.Module) -> Request:
        """Return the request to apply the method to a model."""
        cls, config = self.resolved()
        return Request(model, cls(), config, Wishes(self.target, self.exclude, tuple(self.train)), name="planned")


@dataclass(frozen=True)
class PlannedSite:
    """One site at which the method would add tensors, or one module that several sites would share."""

    name: str
    """The path of the site, with the part's number in front if the method is a hybrid. For a shared module, its
    name."""
    path: str
    """The path of the target module or parameter."""
    shape: tuple[int, ...]
    role: str | None
    tensors: Mapping[str, tuple[int, ...]]
    """The shapes of the tensors that the method saves for the site."""
    trainable: int
    rows: bool = False
    """Whether the site is only some rows of a fused weight, such as the query rows of a QKV matrix."""

    @classmethod
    def of(cls, name: str, operator: nn.Module) -> PlannedSite:
        """Return the entry of a module that several sites share."""
        tensors = {key: tuple(each.shape) for key, each in operator.state_dict().items()}
        return cls(name, "", (), None, tensors, trainable_numbers([operator]))

    @classmethod
    def of_graft(cls, graft: Graft) -> PlannedSite:
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
    """The changes that a method would make to a model, as recorded by `of`."""

    request: Request
    surgeon: RecordingSurgeon
    plan: Plan
    places: tuple[PlannedSite, ...]
    shared: tuple[PlannedSite, ...]
    notes: tuple[str, ...]
    """Notices and warnings that peftcore gave while recording."""

    @classmethod
    def of(cls, wanted: RequestedMethod, model: nn.Module, shards: int | None = None) -> Recorded:
        """Record the changes of a method to a model, which may be sharded over processes.

        Raises: UnknownMethod, ConfigError, TargetError, UnsupportedSite, UnsupportedHost: the method cannot be
            applied to the model.
        """
        with unlogged(), warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            request = wanted.on(model)
            surgeon = record(request, dry=True)
        shared = [(f"shared:{name}", each.module) for name, each in surgeon.owned.items()]
        return cls(
            request=request,
            surgeon=surgeon,
            plan=plan_of(surgeon, shards),
            places=tuple(map(PlannedSite.of_graft, surgeon.grafts)),
            shared=tuple(PlannedSite.of(name, module) for name, module in shared),
            notes=(*surgeon.notices, *(str(each.message) for each in heard if each.category is UserWarning)),
        )

    @property
    def name(self) -> str:
        return self.surgeon.method.name

    @property
    def options(self) -> dict[str, Any]:
        """Return the options that differ from their defaults."""
        return self.surgeon.config.model_dump(mode="json", exclude={"method"}, exclude_defaults=True)

    def operators(self) -> list[nn.Module]:
        """Return all modules that have tensors of the method."""
        return [graft.operator for graft in self.surgeon.grafts] + [each.module for each in self.surgeon.owned.values()]

    def as_dict(self) -> dict[str, Any]:
        return {
            "method": self.name,
            "options": self.options,
            "sites": [place.as_dict() for place in self.places],
            "shared": [place.as_dict() for place in self.shared],
            "trainable": self.plan.trainable,
            "frozen": self.plan.frozen,
            "total": self.plan.total,
            "share": self.plan.share,
        }
