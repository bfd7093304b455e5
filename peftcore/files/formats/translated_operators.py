"""Records of our operators, from which translations read and to which they write."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from peftcore.contract.installed_methods import AppliedMethod
from peftcore.contract.surgeon_protocol import Graft, Surgeon


@dataclass(frozen=True)
class Place:
    """One of our operators, whose tensors a translation reads from a file or writes to one."""

    graft: Graft
    """The record of the operator and the tensors that it acts on."""
    index: int
    """The index of the operator among the operators of its kind."""
    count: int
    """How many operators of its kind there are."""
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
    """Returns the operators that a method recorded."""
    own = [graft for graft in owner.grafts if graft.by_method]
    counts, seen = Counter(type(graft.operator) for graft in own), Counter[type]()
    places = []
    for graft in own:
        kind = type(graft.operator)
        places.append(Place(graft, seen[kind], counts[kind], owner.config.at(graft.site.path)))
        seen[kind] += 1
    return places
