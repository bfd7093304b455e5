"""A witness for each graft: after the host has run, a site that never ran is an error, not a silence.

Modules whose weights are read by others but whose forward is never called (attention output projections, some vision
models' qkv, dead layers) would otherwise carry adapters that train nothing.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import nn

from peftcore.calls import HostState
from peftcore.errors import InactiveSite
from peftcore.mounts import Slot


class Expected(NamedTuple):
    """One site that should run."""

    path: str
    slot: Slot
    tower: str
    name: str


class Witness:
    """A forward hook on the host that judges once, and then takes itself away.

    Sites are judged in groups that differ only in numbers (layers, experts): one that ran speaks for all, since layers
    may be dropped and experts may get no tokens. A tower of a multimodal host from which nothing ran has not been used
    yet, so it waits; so does an injection that did not act.
    """

    def __init__(self, state: HostState) -> None:
        self.state = state
        self.waiting: dict[str, list[Expected]] = {}

    def watch(self, path: str, slot: Slot, tower: str, name: str) -> None:
        """Expect the site of the injection `name` to run."""
        self.waiting.setdefault(re.sub(r"\d+", "*", path), []).append(Expected(path, slot, tower, name))

    def __call__(self, model: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        acting = self.state.unmerged(self.state.current())
        silent: list[str] = []
        for group, members in list(self.waiting.items()):
            if any(member.slot.ran for member in members):
                del self.waiting[group]
            elif not members[0].tower:  # not in a tower of its own, so it has had its chance
                silent += [member.path for member in members if member.name in acting]
        if not self.waiting:
            leave(model)
        if silent:
            shown = ", ".join(silent[:4]) + (" …" if len(silent) > 4 else "")
            raise InactiveSite(
                f"the host ran, but {len(silent)} adapted sites did not: {shown}. Usually their weights are read by "
                "the module around them instead of being called: hand apply the map that peftcore.hosts.probe makes "
                "from example inputs, or target the module around them"
            )


def attend(model: nn.Module, state: HostState) -> Witness:
    """The host's witness; hooks it in when there is none."""
    for hook in model._forward_hooks.values():
        if isinstance(hook, Witness):
            return hook
    witness = Witness(state)
    model.register_forward_hook(witness)
    return witness


def leave(model: nn.Module) -> None:
    """Take the witness away."""
    for key, hook in list(model._forward_hooks.items()):
        if isinstance(hook, Witness):
            del model._forward_hooks[key]


def forget(model: nn.Module, slots: set[int]) -> None:
    """Stop expecting these slots to run: their injection is gone."""
    for hook in list(model._forward_hooks.values()):
        if isinstance(hook, Witness):
            kept = {g: [m for m in members if id(m.slot) not in slots] for g, members in hook.waiting.items()}
            hook.waiting = {group: members for group, members in kept.items() if members}
            if not hook.waiting:
                leave(model)
