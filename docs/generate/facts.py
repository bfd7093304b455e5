"""What pages say of a method: from its class, and from what its surgeon records on the host of its snippet."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

import peftcore
import snippets
from diagram import svg
from kept import ROOT, kept
from peftcore.authoring.budgets import REFERENCES, reference
from peftcore.cli.inspection.show import MethodDescription
from peftcore.contract.method import CATEGORIES, Method
from peftcore.contract.operators import Operator, Replacement, WeightOperator
from peftcore.forward.attention.attention import AttentionOperator
from peftcore.forward.sequence.sequence import SequenceOperator
from peftcore.models.dry_run import Recorded, RequestedMethod
from peftcore.registry.catalogue import MethodInfo
from peftcore.utils.quiet import unlogged

MADE_OF_OTHERS = "made of other methods"
SEVERAL = "several ways at once"
LOW_RANK = "low-rank updates of weights"
UPDATES = "other updates of weights"
IN_PLACE = "tensors of the model itself"
KINDS: Mapping[type[nn.Module], str] = {
    SequenceOperator: "vectors in front of the tokens",
    AttentionOperator: "keys and values of attention",
    WeightOperator: UPDATES,
    Operator: "what modules return",
}
"""Ways of acting, by the kind of operator; the first that fits counts."""
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Facts:
    """One method."""

    shown: MethodDescription

    @property
    def info(self) -> MethodInfo:
        return self.shown.info

    @property
    def cls(self) -> type[Method]:
        return self.shown.cls

    @property
    def name(self) -> str:
        return self.cls.name

    @property
    def title(self) -> str:
        """Its name as people write it: how its text begins."""
        return re.split(r"[:.] ", self.heading, maxsplit=1)[0].split(", ")[0].rstrip(".:")

    @property
    def heading(self) -> str:
        """The first line of its text, without the reference."""
        return re.split(r"\s{2,}", self.shown.text.split("\n\n")[0].replace("\n", " "), maxsplit=1)[0]

    @property
    def checked(self) -> bool:
        """Whether somebody else's numbers exist for it, beside the equation."""
        return self.shown.info.checked

    @property
    def source(self) -> str:
        """Its file, from the root of the repository; its module where it is installed from elsewhere."""
        file = Path(inspect.getfile(self.cls)).resolve()
        return file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else self.cls.__module__

    @property
    def package(self) -> Path:
        """The folder of its package: all that it may share with others of its plugin."""
        return Path(inspect.getfile(sys.modules[self.cls.__module__.partition(".")[0]])).parent

    @cached_property
    def drawing(self) -> str:
        """Where it acts in a model, as SVG."""
        drawn: str = kept(
            f"drawing-{self.name}", lambda: svg(self.name), self.package, *sorted(HERE.glob("diagram*.py"))
        )
        return drawn

    @property
    def snippet(self) -> str:
        return str(self._found["snippet"])

    @property
    def host(self) -> str:
        """What the snippet builds."""
        return str(self._found["host"])

    @property
    def way(self) -> str:
        """How it acts."""
        return str(self._found["way"])

    @property
    def parts(self) -> list[str]:
        """The methods that it is made of, by default."""
        return list(self._found["parts"])

    @cached_property
    def budgets(self) -> Mapping[str, int]:
        """What trains by default, by reference host."""
        found: dict[str, int] = kept(f"budgets-{self.name}", lambda: dict(self.shown.budgets), self.package)
        return found

    @cached_property
    def _found(self) -> dict[str, Any]:
        sources = [self.package, HERE / "facts.py", HERE / "snippets.py"]
        found: dict[str, Any] = kept(f"facts-{self.name}", self._find, *sources)
        return found

    def _find(self) -> dict[str, Any]:
        host = snippets.host(self.cls)
        with unlogged():
            wanted = RequestedMethod(f"{self.info.plugin}/{self.name}", snippets.options(self.cls))
            recorded = Recorded.of(wanted, snippets.built(host))
        return {
            "snippet": snippets.snippet(self.cls),
            "host": host.name,
            "way": way_of(self.cls, recorded),
            "parts": list(dict.fromkeys(part.method.name for part in recorded.surgeon.parts.values())),
        }


def way_of(method: type[Method], recorded: Recorded) -> str:
    """How a method acts, from its tags and the operators that it would put in."""
    if recorded.surgeon.parts:
        return MADE_OF_OTHERS
    if method.tags.low_rank:
        return LOW_RANK
    operators = [graft.operator for graft in recorded.surgeon.grafts if graft.by_method]
    own = [each for each in operators if not isinstance(each, Replacement)]
    if not own:
        return IN_PLACE
    ways = {next(way for kind, way in KINDS.items() if isinstance(each, kind)) for each in own}
    if len(ways) > 1:
        return SEVERAL
    return UPDATES if method.tags.mergeable else ways.pop()


@functools.cache
def every() -> list[Facts]:
    """All methods that are installed, by category and name."""
    shown = [MethodDescription(info, peftcore.method(f"{info.plugin}/{info.name}")) for info in peftcore.methods()]
    order = {category: index for index, category in enumerate(CATEGORIES)}
    return [Facts(each) for each in sorted(shown, key=lambda each: (order[each.info.category], each.info.name))]


def named(name: str) -> Facts | None:
    """The method of that name."""
    return next((each for each in every() if each.name == name), None)


def related(facts: Facts) -> Iterator[Facts]:
    """Its parts, the methods that its text names, and those of its category that act in the same way."""
    words = re.findall(r"`(\w+)`", facts.shown.text)
    told = [named(name) for name in dict.fromkeys([*facts.parts, *words])]
    near = [each for each in every() if each.info.category == facts.info.category and each.way == facts.way]
    found = {each.name: each for each in [*told, *near] if each is not None and each.name != facts.name}
    return iter(found.values())


@functools.cache
def sizes() -> dict[str, int]:
    """Values in each reference host that is installed."""
    found: dict[str, int] = kept("sizes", _sizes)
    return found


def _sizes() -> dict[str, int]:
    hosts = {name: reference(name) for name in REFERENCES}
    known = {name: host for name, host in hosts.items() if host is not None}
    return {name: sum(parameter.numel() for parameter in host.parameters()) for name, host in known.items()}
