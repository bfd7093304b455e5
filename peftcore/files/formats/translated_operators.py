"""Records of peftcore's operators, for translations that read their tensors from a file or write them to one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from peftcore.contract.installed_methods import AppliedMethod
from peftcore.contract.surgeon_protocol import Graft, Surgeon


@dataclass(frozen=True)
class Place:
    """One operator, whose tensors a translation reads from a file or writes to one."""

    graft: Graft
    """The record of the operator and the tensors that it acts on."""
    index: int
    """The index of the operator among the operators of its class."""
    count: int
    """The number of operators of its class."""
    config: Any
    """The options of the operator."""

    @property
    def site(self) -> Any:
        """The site of the operator."""
        return self.graft.site

    @property
    def operator(self) -> Any:
        """The operator; it is on the meta device while a file is read."""
        return self.graft.operator


def places_of(owner: AppliedMethod | Surgeon) -> list[Place]:
    """Returns the operators that a method installed."""
    own = [graft for graft in owner.grafts if graft.by_method]
    counts, seen = Counter(type(graft.operator) for graft in own), Counter[type]()
    places = []
    for graft in own:
        kind = type(graft.operator)
        places.append(Place(graft, seen[kind], counts[kind], owner.config.at(graft.site.path)))
        seen[kind] += 1
    return places
