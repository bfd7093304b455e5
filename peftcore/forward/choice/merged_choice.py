"""A merged injection is in the weights and acts whatever is chosen: which choices are right while injections are
merged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from peftcore.contract.operators import changes_bias
from peftcore.errors import MergeError
from peftcore.forward.choice.active_adapters import Active, Choice
from peftcore.layers.layer import bias_name

if TYPE_CHECKING:
    from peftcore.injection.injection import Injection

Injections = Mapping[str, "Injection"]


def check_choice(injections: Injections, merged: Active, choice: Choice) -> None:
    """Verify that forwards under a choice compute what it says while injections are merged.

    Args:
        injections: those of the host, in the order in which they were applied.
        merged: the names of those that are merged.
        choice: what is to be in force.

    Raises:
        MergeError: a merged one would act all the same, or in another place in the order.
    """
    for name, why, _ in _conflicts(injections, merged, choice):
        raise MergeError(
            f"{name!r} is merged, so it acts in every forward, on all rows and in all branches, but {why}: "
            "unmerge() it first, or bake() it"
        )


def check_merge(injections: Injections, merged: Active, name: str, choice: Choice, where: str = "") -> None:
    """Verify that an injection may be merged while a choice is in force; `where` says whose it is.

    Raises:
        MergeError: forwards under the choice would no longer compute what it says.
    """
    for _, why, remedy in _conflicts(injections, (*merged, name), choice):
        raise MergeError(
            f"{name!r} cannot be merged now: merged it would act in every forward, on all rows and in all branches, "
            f"but {where}{why}: {remedy}"
        )


def _conflicts(injections: Injections, merged: Active, choice: Choice) -> Iterator[tuple[str, str, str]]:
    """Yields merged injections that a choice is wrong about, why, and what to do where they are to be merged."""
    for name in merged:
        if choice.route is not None:
            yield name, "rows of the batch go to different injections", "leave the route first"
        elif choice.composition is not None:
            yield name, "a composition puts branches together", "leave the composition first"
        elif name not in choice.active:
            yield name, f"it is not among what is chosen ({', '.join(choice.active)})", "activate it first"
        else:
            waiting = [each for each in choice.active if each not in merged]
            for other in _before(injections, name, waiting) if waiting else ():
                yield name, f"{other!r} came before it and acts on the same weights", f"merge {other!r} first"


def _before(injections: Injections, name: str, others: list[str]) -> Iterator[str]:
    """Yields those of `others` that were applied before an injection and act on a tensor on which it acts."""
    order = list(injections)
    mine: set[str] = set()
    for other in others:
        if order.index(other) < order.index(name):
            mine = mine or places(injections[name])
            if mine & places(injections[other]):
                yield other


def places(injection: Injection) -> set[str]:
    """Returns the paths of the tensors of the host that an injection may change."""
    found = set()
    for graft in injection.grafts:
        for site in graft.holders:
            tensors = [site.tensor, *([bias_name(site.tensor)] if changes_bias(graft.operator) else [])]
            found |= {f"{site.module_path}.{tensor}".lstrip(".") for tensor in tensors}
    return found
