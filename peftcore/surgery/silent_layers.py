"""Silent layers: after the host has run, an adapted site that never ran is an error.

Modules whose weights are read by others but whose forward is never called (attention output projections, some vision
models' qkv, dead layers) would otherwise carry adapters that train nothing. Training and evaluation are looked at each
for itself: a head may be called in one and read in the other, by a fused loss. A site that has to run once
(`Site.once`), of which the host's code does not say that it does, is an error where the first forward runs it more
often.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from peftcore.errors import InactiveSite, UnsupportedSite
from peftcore.forward.state.adapter_modules import ADAPTER_MODULES
from peftcore.forward.state.slot import Slot, slot_of
from peftcore.targets.sites import SEVERAL

if TYPE_CHECKING:
    from peftcore.forward.state.host_state import HostState
    from peftcore.surgery.surgeon import Surgeon


class Expected(NamedTuple):
    """One site that should run."""

    path: str
    modules: tuple[tuple[Slot, nn.Module], ...]
    """The modules at which its operator acts, with their slots: one that runs is enough."""
    tower: str
    name: str

    def runs(self) -> bool:
        """Whether it ran in the mode in which the model is now; a module that is kept in the other one runs in that."""
        return any(slot.ran[module.training] for slot, module in self.modules)

    def ran(self, training: bool) -> bool:
        """Whether it ran in a mode."""
        return any(slot.ran[training] for slot, _ in self.modules)


logger = logging.getLogger("peftcore")
NUMBER = re.compile(r"\d+")
Sites = dict[str, list[Expected]]
"""Expected sites by injection, so that one injection of many is forgotten at once."""


@dataclass
class Siblings:
    """Sites that should run and are children of one module, with the children that the module had then."""

    children: frozenset[str]
    sites: Sites


class SilentLayers:
    """Checks the sites of a host after its forwards, until all have run, in training and in evaluation. It begins again
    when a module was added next to an adapted one: a projection fused from several, for one, that reads their weights
    and replaces them.

    Sites are checked in groups that differ only in numbers (layers, experts): one that ran speaks for all, since layers
    may be dropped and experts may get no tokens. A tower of a multimodal host from which nothing ran has not been used
    yet, so it waits; so does an injection that was not active.
    """

    def __init__(self) -> None:
        self.new: dict[str, Surgeon] = {}
        """Injections whose sites are not watched yet: applying many does not wait for it."""
        self.waiting: dict[bool, dict[str, Sites]] = {False: {}, True: {}}
        """Sites that have not run yet in evaluation, and in training, by group."""
        self.siblings: dict[nn.Module, list[Siblings]] = {}
        self.places: dict[str, list[nn.Module]] = {}
        """The modules of `siblings` by the name of their class."""
        self.once: dict[str, list[tuple[str, Slot]]] = {}
        """Sites that have to run once, by injection, until a forward has run them."""
        self._turn = 0

    def _watch(self, holder: nn.Module, site: Expected) -> None:
        """Expect a site to run; `holder` is the module whose child it is."""
        self._wait(site)
        known = self.siblings.get(holder)
        if known is None:
            self._place(holder)
            known = self.siblings[holder] = []
        if not known or len(holder._modules) != len(known[-1].children):
            known.append(Siblings(frozenset(holder._modules), {}))
        known[-1].sites.setdefault(site.name, []).append(site)

    def _wait(self, site: Expected) -> None:
        group = NUMBER.sub("*", site.path)
        for waiting in self.waiting.values():
            waiting.setdefault(group, {}).setdefault(site.name, []).append(site)

    def _place(self, holder: nn.Module) -> None:
        self.places.setdefault(type(holder).__name__, []).append(holder)

    def expect(self, injection: tuple[str, Surgeon | None]) -> None:
        """Expect the sites of an injection to run, from the host's next forward on; with None as surgeon, stop it."""
        name, surgeon = injection
        if surgeon is None:
            return self._forget(name)
        self.new[name] = surgeon
        sites = [graft.site for graft in surgeon.grafts if graft.site.once]
        if slots := [(site.path, slot) for site in sites if (slot := slot_of(site.module)) is not None]:
            self.once[name] = slots
        return None

    def _forget(self, name: str) -> None:
        for known in self.siblings.values():
            for each in known:
                each.sites.pop(name, None)
        self.siblings = {
            holder: left for holder, known in self.siblings.items() if (left := [each for each in known if each.sites])
        }
        self.places = {}
        for holder in self.siblings:
            self._place(holder)
        self.new.pop(name, None)
        self._count_no_more(name)
        for mode, waiting in self.waiting.items():
            for members in waiting.values():
                members.pop(name, None)
            self.waiting[mode] = {group: members for group, members in waiting.items() if members}

    def _count_no_more(self, name: str) -> None:
        for _, slot in self.once.pop(name, []):
            slot.runs = None

    @property
    def is_idle(self) -> bool:
        """Whether no site is expected to run."""
        return not self.new and not any(self.waiting.values())

    def check(self, model: nn.Module) -> None:
        """Watch sites again whose parent module got new children since. Without gradients, where each token checks, one
        module of each class is checked, in turn: projections are fused in all blocks at once."""
        for _, slot in chain.from_iterable(self.once.values()):
            slot.runs = 0  # parts may have run by themselves
        self._turn += 1
        recorded = torch.is_grad_enabled()
        for alike in self.places.values():
            for place in alike if recorded else (alike[self._turn % len(alike)],):
                for each in self.siblings[place]:
                    if len(place._modules) != len(each.children):
                        return self._check_everywhere()

    def _check_everywhere(self) -> None:
        for holder, known in self.siblings.items():
            for each in known:
                if len(holder._modules) == len(each.children):
                    continue
                before, each.children = each.children, frozenset(holder._modules)
                if not each.children <= before | {ADAPTER_MODULES}:
                    for site in chain.from_iterable(each.sites.values()):
                        for slot, _ in site.modules:
                            slot.ran = [False, False]
                        self._wait(site)

    def judge(self, state: HostState, training: bool) -> None:
        """Check, after a forward of the host in this mode, that all active sites ran in it.

        Raises:
            InactiveSite: active sites did not run. In evaluation this is raised only if they did not run in training
                either, since auxiliary heads run in training alone.
            UnsupportedSite: a site that has to run once per forward ran more often.
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
            for holder, site in _expected(surgeon, name):
                self._watch(holder, site)
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
            logger.warning(f"{len(paths)} adapted sites ran in training and do not in evaluation: {shown}")
            return
        once = "; they did in evaluation: a loss that reads their weights?" if silent[0].ran(False) else ""
        ran = "the host ran in training" if once else "the host ran"
        raise InactiveSite(
            f"{ran}, but {len(paths)} adapted sites did not: {shown}{once}. Usually their weights are read by the "
            "module around them instead of being called: hand apply the map that peftcore.roles.probe makes from "
            "example inputs, or target the module around them. If they ran before, their weights were fused into new "
            "modules (fuse_qkv_projections): undo that, or merge before it"
        )


def _expected(surgeon: Surgeon, name: str) -> Iterator[tuple[nn.Module, Expected]]:
    """Yields the sites of an injection that should run, with the modules whose children they are and the tower of a
    multimodal host in which they are."""
    modules = surgeon.resolver.modules
    towers = sorted({entry.tower for entry in surgeon.resolver.host.entries} - {""}, key=len, reverse=True)
    for graft in surgeon.grafts:
        path = graft.site.module_path
        acts = [each for each in graft.holders if each.form not in graft.operator.observes] or graft.holders
        slots = tuple([(slot, each.module) for each in acts if (slot := slot_of(each.module)) is not None])
        tower = next((each for each in towers if f"{path}.".startswith(f"{each}.")), "")
        if slots and graft.by_method:
            yield modules.get(path[: max(path.rfind("."), 0)], graft.site.module), Expected(path, slots, tower, name)
