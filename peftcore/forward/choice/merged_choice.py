"""Checks whether a choice of active injections is correct while injections are merged. A merged injection is in the
weights, so it acts in every forward."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from peftcore.contract.installed_methods import AppliedMethod, Installed
from peftcore.contract.operators import changes_bias
from peftcore.errors import MergeError
from peftcore.forward.choice.active_adapters import Active, Choice
from peftcore.layers.layer import bias_name

Injections = Mapping[str, AppliedMethod]


def check_choice(injections: Injections, merged: Active, choice: Choice) -> None:
    """Check that forwards with a choice of active adapters compute the right result while injections are merged.

    Args:
        injections: the injections of the host, in the order in which they were applied.
        merged: the names of the merged injections.
        choice: the choice to check.

    Raises:
        MergeError: a merged injection would act although the choice excludes it, or before an injection that was
            applied earlier.
    """
    for name, why, _ in _conflicts(injections, merged, choice):
        raise MergeError(
            f"{name!r} is merged, so it acts in every forward, on all rows and in all branches, but {why}: "
            "unmerge() it first, or bake() it"
        )


def check_merge(injections: Injections, merged: Active, name: str, choice: Choice, where: str = "") -> None:
    """Check that an injection may be merged while a choice of active adapters is in force. `where` describes the owner
    of the choice in the error message.

    Raises:
        MergeError: forwards with the choice would no longer compute the right result.
    """
    for _, why, remedy in _conflicts(injections, (*merged, name), choice):
        raise MergeError(
            f"{name!r} cannot be merged now: merged it would act in every forward, on all rows and in all branches, "
            f"but {where}{why}: {remedy}"
        )


def _conflicts(injections: Injections, merged: Active, choice: Choice) -> Iterator[tuple[str, str, str]]:
    """Yields (name, reason, remedy) for each merged injection that conflicts with a choice of active adapters."""
    for name in merged:
        if choice.route is not None:
            yield name, "rows of the batch go to different injections", "leave the route first"
        elif choice.composition is not None:
            yield name, "a composition combines branches", "leave the composition first"
        elif name not in choice.active:
            yield name, f"the chosen adapters ({', '.join(choice.active)}) do not include it", "activate it first"
        else:
            # One that was removed meanwhile acts nowhere: a forward under this choice raises UnknownInjection.
            waiting = [each for each in choice.active if each in injections and each not in merged]
            for other in _before(injections, name, waiting) if waiting else ():
                yield name, f"{other!r} was applied before it and acts on the same weights", f"merge {other!r} first"


def _before(injections: Injections, name: str, others: list[str]) -> Iterator[str]:
    """Yields those of `others` that were applied before an injection and change a tensor that it changes too."""
    order = list(injections)
    mine: set[str] = set()
    for other in others:
        if order.index(other) < order.index(name):
            mine = mine or places(injections[name])
            if mine & places(injections[other]):
                yield other


def places(injection: AppliedMethod) -> set[str]:
    """Returns the paths of the tensors of the host that an injection may change."""
    found = set()
    for graft in injection.grafts:
        for site in graft.holders:
            tensors = [site.tensor, *([bias_name(site.tensor)] if changes_bias(graft.operator) else [])]
            found |= {f"{site.module_path}.{tensor}".lstrip(".") for tensor in tensors}
    return found


def check_unread(reader: Installed, merged: str, changed: Collection[str]) -> None:
    """Check that no operator of an injection reads tensors of the base into which another injection is merged.

    Args:
        reader: the injection.
        merged: the name of the other injection.
        changed: the paths of the tensors that the other injection changes.

    Raises:
        MergeError: an operator reads one of these tensors.
    """
    if both := sorted(reader.reads_from_base.intersection(changed)):
        raise MergeError(
            f"{reader.method.name} computes with the base's {both[0]}, and {merged!r} merged into it would change the "
            f"outputs of {reader.method.name}: keep {merged!r} active and unmerged, or bake() it before "
            f"{reader.method.name} is applied"
        )
