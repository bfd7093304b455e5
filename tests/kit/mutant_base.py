"""What the mutants have in common: a small low-rank method that keeps every promise; each mutant breaks one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import ConfigDict
from torch import Tensor, nn

from peftcore.author import Method, MethodConfig, Operator, Site, Tags
from peftcore.contract.surgeon_protocol import Surgeon
from peftcore.testing import Case

RANK = 2


class SmallConfig(MethodConfig):
    """No options; `mutant` names the method."""


class Unmergeable(Operator):
    """``y = W x + B A x``, and no word about the effective weight."""

    def __init__(self, site: Site, config: MethodConfig) -> None:
        super().__init__(site)
        self.A = nn.Parameter(torch.randn(RANK, site.in_features, *site.kernel) / math.sqrt(site.in_features))
        self.B = nn.Parameter(torch.zeros(site.out_features, RANK))

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        A, B = self.cast(y, self.A, self.B)
        return self.layer.add(y, self.layer.apply(x, A), B, 1.0)


class Small(Unmergeable):
    """The same, with its effective weight."""

    def merged(self, weight: Tensor) -> Tensor:
        return weight + (self.B @ self.A.flatten(1)).view(weight.shape)


TAGS = Tags(category="reparameterized", paper="2106.09685", mergeable=True)
NOT_MERGEABLE = Tags(category="reparameterized", paper="2106.09685")


def graft_all(self: Method, model: nn.Module, config: Any, surgeon: Surgeon) -> None:
    """The usual `inject`."""
    for site in surgeon.sites():
        surgeon.graft(site, self.operator, config)  # type: ignore[attr-defined]


def count(site: Site, config: Any) -> int:
    """The closed formula of `Small`."""
    return RANK * (site.in_features * math.prod(site.kernel) + site.out_features)


def mutant(
    name: str,
    operator: type = Small,
    *,
    config: type[MethodConfig] = SmallConfig,
    tags: Tags = TAGS,
    target: Any = ("attn.q", "attn.v"),
    inject: Callable[..., None] = graft_all,
    parameter_count: Callable[..., int] = count,
    **members: Any,
) -> type[Method]:
    """A method class, findable in this module so that it can be pickled."""
    label = "".join(part.title() for part in name.split("_"))
    fields = {
        "__annotations__": {"method": Literal[name]},
        "method": name,
        "__module__": __name__,
        "__doc__": "Options.",
        "model_config": ConfigDict(use_attribute_docstrings=False),  # pydantic would look for its source, at length
    }
    config = globals()[f"{label}Config"] = type(f"{label}Config", (config,), fields)
    members |= {"name": name, "operator": operator, "Config": config, "tags": tags, "target": target, "inject": inject}
    members |= {"parameter_count": staticmethod(parameter_count), "__module__": __name__, "__qualname__": label}
    method: type[Method] = type(label, (Method,), members)
    globals()[label] = method
    return method


good = mutant("good")
Entry = tuple[type[Method], str] | tuple[type[Method], str, type[Case]]
"""A mutant and the host on which it fails; a `Case` with a sabotaged step where no method could break the promise."""
