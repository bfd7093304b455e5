"""Default targets of a method: the first of its alternatives that is present in the host, and notices for the user
about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from peftcore.contract.method import Method
from peftcore.errors import TargetError
from peftcore.roles import HostMap
from peftcore.roles.hostmap import under
from peftcore.roles.virtual_roles import ALL_LAYERS
from peftcore.targets.resolver import Resolver, Target, names_a_role
from peftcore.targets.sites import Site


class Defaults(NamedTuple):
    """The chosen default target of a method, with its sites."""

    sites: list[Site]
    target: Target
    unknown: TargetError | None = None
    """The error of an earlier alternative that is present in the host but cannot be used; otherwise None."""


def default_sites(resolver: Resolver, targets: Sequence[Target], exclude: Target | None = None) -> Defaults:
    """Returns the sites of the first target that is present in the host, at least in part, without the sites of
    `exclude`. The sites are in the host's main tower, unless the main tower lacks all targets.

    Raises:
        TargetError: the host lacks all targets; a target is a slice of fused weights whose slices are known only after
            a forward; or all sites were excluded.
    """
    unknown: TargetError | None = None
    host = resolver.host
    for tower in (host.main_tower(), None):  # heads and projectors stand outside of all towers
        for target in targets:
            held = [part for part in _parts(target) if not names_a_role(part) or host.knows(part)]  # no ends of paths
            try:
                found, _ = resolver.matching(held, tower)
            except TargetError as error:
                unknown = unknown or error
                continue
            if found:
                return Defaults(resolver.without(found, target, exclude), target, unknown)
    raise unknown or TargetError(resolver.nothing("target", *_parts(targets[0])))


def notices(method: Method, taken: Defaults, resolver: Resolver) -> Iterator[str]:
    """Yields notices about the default target of a method with alternatives: which one was chosen, and which parts of
    the host lack sites."""
    host, name = resolver.host, type(resolver.model).__name__
    paths, listed = [site.module_path for site in taken.sites], _listed(taken.target)
    if taken.target != method.target:
        reason = f"this {name} has none of {_listed(method.target)}" if taken.unknown is None else str(taken.unknown)
        acts = f"it acts at {listed} ({len(paths)} layers). Pass target= to choose other layers"
        yield f"{method.name}: {reason}; so {acts}"
    if left := list(_left_out(host, paths)):
        hint = "" if taken.target == ALL_LAYERS else f"; target={ALL_LAYERS!r} covers all matrices and convolutions"
        yield f"{method.name}: its default target {listed} leaves out {', '.join(left)} of this {name}{hint}"


def _left_out(host: HostMap, paths: Sequence[str]) -> Iterator[str]:
    """Yields descriptions of the towers and blocks with weights but without a site. Yields nothing if all sites are
    outside of blocks."""
    block_of = {entry.module: entry.block for entry in host.entries}
    acted = {block for path in paths if (block := block_of.get(path)) is not None}
    if not acted:
        return
    weighty = {entry.block: entry.tower for entry in host.entries if entry.block is not None and entry.shape}
    towers = {tower for block, tower in weighty.items() if block in acted}
    yield from (tower or "the rest" for tower in sorted(set(weighty.values()) - towers))
    blocks = [block for block, tower in weighty.items() if tower in towers]
    if idle := [block for block in blocks if not any(under(each, block) or under(block, each) for each in acted)]:
        yield f"{len(idle)} of {len(blocks)} blocks ({idle[0]}{', ...' if len(idle) > 1 else ''})"


def _parts(target: Target) -> Sequence[Any]:
    return [target] if isinstance(target, str | type) or callable(target) else target


def _listed(target: Target) -> str:
    return ", ".join(map(str, _parts(target)))
