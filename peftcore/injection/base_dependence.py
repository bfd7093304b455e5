"""Handles operators that compute with values of the base model, such as singular vectors of a weight, and do not save
these values in files. Both when the adapter is applied and when it is loaded, the values must be computed from base
weights without merged adapters.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from torch import nn

from peftcore.contract.operators import WeightOperator, is_made_of_base
from peftcore.errors import MergeError
from peftcore.forward.choice.merged_choice import check_unread, places
from peftcore.forward.state.host_state import HostState, state_of
from peftcore.injection.injection import Injection, installed
from peftcore.injection.originals import fingerprint
from peftcore.targets.sites import Site

logger = logging.getLogger("peftcore")


def check_nothing_merged(injection: Injection, state: HostState) -> None:
    """Verify that no adapter is merged into the weights from which a new injection is computed.

    Raises:
        MergeError: another injection is merged into such a weight.
    """
    made = {_place(site) for _, site, _ in _made(injection)}
    for name in state.merged:
        changed = places(state.injections[name])
        if both := sorted(changed & made):
            raise MergeError(
                f"{injection.method.name} is computed from the base's weights, but {name!r} is merged into "
                f"{both[0]}: unmerge() it first and merge it again afterwards, or bake() it"
            )
        check_unread(injection, name, changed)


def note_base(injection: Injection) -> None:
    """Record fingerprints of the base weights from which an injection is computed."""
    for key, site, _ in _made(injection):
        weight = site.base_weight()
        if not weight.is_meta:
            injection.made_of[key] = fingerprint(weight)


def make_anew(model: nn.Module, _: Any) -> None:
    """Hook that runs after an adapted model has loaded a state dict, maybe of another base. It recomputes the adapter
    tensors that are computed from base weights, except from weights into which an adapter is merged.
    """
    state = state_of(model)
    assert state is not None
    merged = _merged(state)
    for injection in installed(state).values():
        for _key, site, operator in _made(injection):
            if _place(site) not in merged:
                operator.take_base(site.base_weight())
        note_base(injection)


def warn_of_another_base(injection: Injection) -> None:
    """Log a warning if base weights have changed since an injection was computed from them. Called when the injection
    is saved."""
    merged = _merged(injection.state)
    changed = [
        _place(site)
        for key, site, _ in _made(injection)
        if key in injection.made_of and _place(site) not in merged
        if fingerprint(site.base_weight()) != injection.made_of[key]
    ]
    if changed:
        logger.warning(
            "%s is computed from the base's weights, and %d of them have changed since (%s first): when it is loaded, "
            "it is computed from the weights of that time, and its outputs differ from those here",
            injection.name,
            len(changed),
            changed[0],
        )


def _made(injection: Injection) -> Iterator[tuple[str, Site, WeightOperator]]:
    """Yields the key, the site and the operator of each graft (installed operator) that is computed from base
    weights."""
    for graft in injection.grafts:
        if is_made_of_base(graft.operator):
            assert isinstance(graft.operator, WeightOperator)
            yield graft.key, graft.site, graft.operator


def _place(site: Site) -> str:
    return f"{site.module_path}.{site.tensor}".lstrip(".")


def _merged(state: HostState) -> set[str]:
    """Returns the paths of the tensors into which an injection is merged."""
    return {place for name in state.merged for place in places(state.injections[name])}
