"""Watches adapted sites. A forward of the host raises an error if a site was removed from the model, was resized, or
does not run.

A site may be removed by `resize_token_embeddings`, by a new head or by an exchanged layer. The new module would run
without the adapter. Modules that were wrapped (compiled, checkpointed) or moved to another path are still in the model,
and their adapters act.

Some modules are never called, because other modules read their weights (attention output projections, some vision
models' qkv), or because they are not used at all. Their adapters would train nothing. Training and evaluation are
checked separately: a head may be called in one mode, while a fused loss reads its weight in the other.

Some sites must run once per forward (`Site.once`), but the host's code does not show whether they do. If the first
forward runs such a site more often, it raises an error.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peftcore.errors import InactiveSite, UnsupportedSite
from peftcore.forward.state.host_state import HostState
from peftcore.forward.state.slot import Slot, slot_of
from peftcore.layers.adapter_modules import ADAPTER_MODULES
from peftcore.layers.fsdp import MANAGED, in_group
from peftcore.layers.pieces import is_cut
from peftcore.libraries.save_pretrained import saving_base
from peftcore.targets.sites import SEVERAL
from peftcore.utils.journal import Journal

if TYPE_CHECKING:
    from peftcore.contract.installed_methods import AppliedMethod
    from peftcore.contract.surgeon_protocol import Surgeon
    from peftcore.targets.sites import Site

logger = logging.getLogger("peftcore")
NUMBER = re.compile(r"\d+")


@dataclass(slots=True, eq=False)
class Expected:
    """A site that is expected to run in forwards of the host."""

    path: str
    modules: tuple[tuple[Slot, nn.Module], ...]
    """The modules at which the site's operator acts, with their slots. One of them must run."""
    tower: str
    name: str
    holder: nn.Module
    """The parent module of the site's module."""
    siblings: frozenset[str]
    """The names of the children of `holder` at the time when the site was last expected to run. If `holder` gets a new
    child, the site is expected to run again."""

    def runs(self) -> bool:
        """Whether the site ran in the current mode of its modules, training or evaluation."""
        return any(slot.ran[module.training] for slot, module in self.modules)

    def ran(self, training: bool) -> bool:
        """Whether the site ran in the given mode: True for training, False for evaluation."""
        return any(slot.ran[training] for slot, _ in self.modules)


class WatchedSites:
    """Checks the sites of a host: before each forward that they are in the model, and after the forward that they ran.
    The second check ends when all sites have run. It is separate for training and evaluation. If a module is added to
    the parent of a site, the site is expected to run again, since the new module may replace it (a fused projection
    that reads the weights of several).

    Sites are checked in groups whose paths differ only in numbers (layers, experts). If one site of a group ran, all of
    them count as run, since layers may be dropped and experts may get no tokens. Two kinds of sites are checked later:
    those in a tower of a multimodal host that was not used yet, and those of an injection that was not active.
    """

    def __init__(self) -> None:
        self.ways: dict[str, list[tuple[nn.Module, dict[str, nn.Module | None]]]] = {}
        """For each injection that was active: all modules on the paths from the root to its modules, with their
        children at the last check."""
        self.tables: dict[str, list[tuple[Site, torch.Size]]] = {}
        """The token tables of each injection, with their shapes when it was applied: resizing changes a table in
        place."""
        self.new: dict[str, Surgeon] = {}
        """Injections whose sites are not listed yet; they are listed after the first forward, so that applying many
        adapters stays fast."""
        self.sites: dict[str, list[Expected]] = {}
        self.waiting: dict[bool, dict[str, dict[str, list[Expected]]]] = {False: {}, True: {}}
        """Sites that have not run yet, for evaluation (False) and training (True), by group and injection."""
        self.once: dict[str, list[tuple[str, Slot]]] = {}
        """By injection, sites that must run once per forward, as long as no forward has run them."""

    def expect(self, journal: Journal, surgeon: Surgeon, state: HostState, name: str) -> None:
        """From the next forward on, expect the sites of a new injection to be in the model and to run."""
        sites = (site for graft in surgeon.grafts for site in graft.holders if site.form in ("activation", "weight"))
        tables = [(each, each.layer.shape(each.module, each.tensor)) for each in sites if _is_table(each)]
        journal.put(self, "tables", name, tables)
        if not state.watches_runs:  # it was compiled
            self.forget_runs()
            state.watches_runs = True
        journal.call(WatchedSites._expect_runs, self, (name, None), (name, surgeon))

    def forget(self, journal: Journal, surgeon: Surgeon, name: str) -> None:
        """Stop watching the sites of an injection."""
        self.ways.pop(name, None)  # found again where it is missing
        journal.drop(self, "tables", name)
        journal.call(WatchedSites._expect_runs, self, (name, surgeon), (name, None))

    def _expect_runs(self, injection: tuple[str, Surgeon | None]) -> None:
        """Expect the sites of an injection to run. If its surgeon is None, stop expecting this."""
        name, surgeon = injection
        if surgeon is None:
            self._forget_runs(name)
            return
        self.new[name] = surgeon
        lone = [graft.site for graft in surgeon.grafts if graft.site.once]
        if slots := [(site.path, slot) for site in lone if (slot := slot_of(site.module)) is not None]:
            self.once[name] = slots

    def _forget_runs(self, name: str) -> None:
        self.new.pop(name, None)
        self.sites.pop(name, None)
        self._count_no_more(name)
        for waiting in self.waiting.values():
            for group, members in [*waiting.items()]:
                if members.pop(name, None) is not None and not members:
                    del waiting[group]

    def forget_runs(self) -> None:
        """Stop expecting sites to run, for all injections."""
        for name in [*self.once]:
            self._count_no_more(name)
        self.new, self.sites, self.waiting = {}, {}, {False: {}, True: {}}

    def _count_no_more(self, name: str) -> None:
        for _, slot in self.once.pop(name, []):
            slot.runs = None

    def begin(self, model: nn.Module, state: HostState, acting: Iterable[str]) -> None:
        """Check the modules of the named injections before a forward of the host.

        Raises:
            InactiveSite: as `check`.
        """
        for _, slot in chain.from_iterable(self.once.values()):
            slot.runs = 0  # parts may have run by themselves
        self.check(model, state, acting)

    def check(self, model: nn.Module, state: HostState, acting: Iterable[str]) -> None:
        """Check that the modules of the named injections are still in the model, at the same or another path.

        Raises:
            InactiveSite: a module is not in the model any more; a token table was resized; or a tensor was split over
                processes (tensor parallelism) by code that does not gather it for the forward.
        """
        for name in acting:
            ways = self.ways.get(name)
            if ways is None or any(each._modules != children for each, children in ways):
                self.ways[name] = list(_ways(model, state.injections[name]))
                for site in self.sites.get(name, ()):
                    self._look_again(site)
            if in_group():
                _check_whole(name, state.injections[name])
            for table, shape in self.tables.get(name, ()):
                if (now := table.layer.shape(table.module, table.tensor)) != shape:
                    raise InactiveSite(
                        f"{table.path}: resized from {list(shape)} to {list(now)} after {name!r} was applied, so the "
                        "adapter does not fit any more. Save and remove() it before the model is resized; then load it "
                        "again"
                    )

    def _look_again(self, site: Expected) -> None:
        """Expect a site to run again if its parent got a new child."""
        before, site.siblings = site.siblings, frozenset(site.holder._modules)
        if not site.siblings <= before | {ADAPTER_MODULES}:
            for slot, _ in site.modules:
                slot.ran = [False, False]
            self._wait(site)

    def _wait(self, site: Expected) -> None:
        group = NUMBER.sub("*", site.path)
        for waiting in self.waiting.values():
            waiting.setdefault(group, {}).setdefault(site.name, []).append(site)

    def judge(self, state: HostState, training: bool) -> None:
        """Check, after a forward of the host, that all active sites have run. `training` is the mode of the forward.

        Raises:
            InactiveSite: active sites did not run. After a forward in evaluation, this is raised only if they did not
                run in training either, since auxiliary heads run only in training.
            UnsupportedSite: a site that must run once per forward ran more often.
        """
        if not self.new and not self.waiting[training] and not self.once:
            return
        acting = state.unmerged(state.current())
        for name in self.once.keys() & {*acting}:
            for path, slot in self.once[name]:
                if slot.runs is not None and slot.runs > 1:
                    raise UnsupportedSite(f"{path} {SEVERAL}")
            if all(slot.runs for _, slot in self.once[name]):
                self._count_no_more(name)
        silent: list[Expected] = []
        new, self.new = self.new, {}  # forwards of other threads check, too
        for name, surgeon in new.items():
            self.sites[name] = list(_expected(surgeon, name))
            for site in self.sites[name]:
                self._wait(site)
        waiting = self.waiting[training]
        for group, sites in list(waiting.items()):
            members = list(chain.from_iterable(sites.values()))
            if any(member.runs() for member in members):
                waiting.pop(group, None)
            elif not members[0].tower:  # not in a tower of its own, so it has had its chance
                silent += [member for member in members if member.name in acting]
        if not silent:
            return
        paths = [member.path for member in silent]
        shown = ", ".join(paths[:4]) + (" …" if len(paths) > 4 else "")
        if not training and all(member.ran(True) for member in silent):
            for group in {NUMBER.sub("*", path) for path in paths}:
                waiting.pop(group, None)
            logger.warning(f"{len(paths)} adapted sites ran in training but not in evaluation: {shown}")
            return
        once = (
            ("; they ran in evaluation, so the training loss may read their weights directly")
            if silent[0].ran(False)
            else ""
        )
        ran = "the host ran in training" if once else "the host ran"
        raise InactiveSite(
            f"{ran}, but {len(paths)} adapted sites did not: {shown}{once}. Usually the module around them reads their "
            "weights instead of calling them: pass apply(..., host=...) the map that peftcore.roles.probe makes from "
            "example inputs, or target the module around them. If they ran before, their weights were fused into new "
            "modules (fuse_qkv_projections): undo that, or merge before it"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "ways": {}}


def watched_sites(state: HostState) -> WatchedSites:
    """Returns the `WatchedSites` of a host, which is created if missing."""
    if not isinstance(state.watched, WatchedSites):
        state.watched = WatchedSites()
    return state.watched


def _expected(surgeon: Surgeon, name: str) -> Iterator[Expected]:
    """Yields the sites of an injection that must run."""
    modules = surgeon.resolver.modules
    towers = sorted({entry.tower for entry in surgeon.resolver.host.entries} - {""}, key=len, reverse=True)
    siblings: dict[nn.Module, frozenset[str]] = {}  # one set for all children of a module
    for graft in surgeon.grafts:
        path = graft.site.module_path
        acts = [each for each in graft.holders if each.form not in graft.operator.observes] or graft.holders
        slots = tuple([(slot, each.module) for each in acts if (slot := slot_of(each.module)) is not None])
        tower = next((each for each in towers if f"{path}.".startswith(f"{each}.")), "")
        if slots and graft.by_method:
            holder = modules.get(path[: max(path.rfind("."), 0)], graft.site.module)
            names = siblings.setdefault(holder, frozenset(holder._modules))
            yield Expected(path, slots, tower, name, holder, names)


def _check_whole(name: str, injection: AppliedMethod) -> None:
    """Raise InactiveSite if a tensor was split over processes after the adapter was made for the whole tensor."""
    for graft in injection.grafts:
        for site in graft.holders:
            held = site.module._parameters.get(site.tensor)
            if held is not None and is_cut(held) and not site.layer.in_pieces and MANAGED not in vars(site.module):
                raise InactiveSite(
                    f"{site.path}: sharded over processes after {name!r} was applied. Save and remove() the adapter "
                    "before the model is made tensor-parallel; then load it again, or apply it to that model"
                )


def _is_table(site: Site) -> bool:
    """Whether a site's tensor is a token table. If an operator replaces the tensor, the host's layer is checked."""
    return site.layer.one_hot or (site.form == "weight" and site.layer_of(site.module, site.tensor).one_hot)


def _ways(model: nn.Module, injection: AppliedMethod) -> Iterator[tuple[nn.Module, dict[str, nn.Module | None]]]:
    """Yields the modules on the paths from the root to the injection's modules, with their children.

    Raises:
        InactiveSite: some of the injection's modules are not in the model.
    """
    modules = {site.module: site.path for graft in injection.grafts for site in graft.holders}
    with saving_base():  # operators are no target modules, and there may be many
        paths = {module: path for path, module in model.named_modules() if module in modules}
    if gone := [path for module, path in modules.items() if module not in paths]:
        shown = ", ".join(gone[:4]) + (" …" if len(gone) > 4 else "")
        raise InactiveSite(
            f"{shown}: replaced or taken out of the model since {injection.name!r} was applied, so the adapter does "
            "not act there. Save or merge it, and remove() it, before the model is changed; then apply or load it again"
        )
    seen: set[nn.Module] = set()
    for path in paths.values():
        at: Any = model
        for key in path.split(".") if path else ():
            if at not in seen:
                seen.add(at)
                yield at, dict(at._modules)
            at = at._modules[key]
