"""Virtual roles, such as "all-linear". No single weight has a virtual role: a rule over the whole map finds its
entries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peftcore.roles.entries import HostEntry
    from peftcore.roles.hostmap import HostMap

ALL_LAYERS = "all-layers"
_LINEAR_FAMILIES = frozenset({"attn", "cross", "mlp", "attn_mlp", "ssm", "experts"})


def _in_body(host: HostMap, entry: HostEntry) -> bool:
    """Whether an entry is in a block; in hosts without blocks every entry counts."""
    return entry.block is not None or not host.has_blocks


def _all_linear(host: HostMap) -> list[HostEntry]:
    if not host.has_blocks:
        return [entry for entry in host.entries if len(entry.shape) == 2 and entry.kind == "linear"]
    return [
        entry
        for entry in host.entries
        if entry.block is not None
        and (len(entry.shape) == 2 or entry.kind in ("conv", "experts") or entry.role.startswith("experts."))
        and entry.role.partition(".")[0] in _LINEAR_FAMILIES
        and "." in entry.role
        and entry.role not in ("ssm.conv", "ssm.dt")  # mixers read them, so inputs could not be dropped there
    ]


def _all_layers(host: HostMap) -> list[HostEntry]:
    """Returns the entries of "all-linear", and the convolutions in blocks that mix channels. In a host without blocks,
    returns all matrices and convolutions except the head."""
    convolutions = [entry for entry in host.entries if entry.kind == "conv"]
    if not host.has_blocks:
        every = [*_all_linear(host), *convolutions]
        return [entry for entry in every if entry.role != "head"] or every
    mixing = [entry for entry in convolutions if entry.role in ("conv", "down") and entry.shape[1] > 1]
    return [*_all_linear(host), *(entry for entry in mixing if entry.block is not None)]


def enclosing(host: HostMap, path: str, role: str) -> HostEntry | None:
    """Returns the entry of a role whose path is the given path or its nearest ancestor."""
    at_or_above = (entry for prefix in prefixes(path) for entry in host.at(prefix))
    return next((entry for entry in at_or_above if entry.role == role), None)


def _attention_outputs(host: HostMap) -> list[HostEntry]:
    """Returns the entries of "attn.output". Usually these are the output matrices: each is the last matrix of its
    branch, before residual, post-norm, scale and gate. The output of the attention module itself may contain the
    residual (BERT, Bloom, UNet). Only if the output matrix is not called as a module, the entry is the attention
    itself."""
    found: dict[str, HostEntry] = {}
    for entry in host.entries:
        if entry.role not in ("attn.out", "cross.out", "attn_mlp.out") or not _in_body(host, entry):
            continue
        place: HostEntry | None = entry
        if entry.kind == "experts" or (entry.tensor or "").startswith("out_proj."):
            place = enclosing(host, entry.path, entry.role.partition(".")[0])
        elif entry.tensor is not None:
            place = None  # a bare parameter gives nothing back, and its module adds the residual (XLNet)
        if place is not None:
            found[place.path] = place
    return list(found.values())


def _cores(family: str) -> Callable[[HostMap], list[HostEntry]]:
    """Returns the rule for modules that compute an attention: those that contain its query, key and value matrices.
    Usually this is the attention module itself. In BERT it is a module inside it, because BERT's attention module also
    contains the output matrix and the norm."""

    def cores(host: HostMap) -> list[HostEntry]:
        owners: dict[str, list[list[str]]] = {}
        for entry in host.entries:
            place = enclosing(host, entry.path, family) if entry.role in _CORE_ROLES[family] else None
            if place is not None:
                owner = entry.module if entry.tensor is not None else entry.module.rpartition(".")[0]
                owners.setdefault(place.path, []).append(owner.split("."))
        return [
            replace(entry, module=".".join(_common(owners.get(entry.path, [entry.module.split(".")]))))
            for entry in host.by_role.get(family, [])
            if _in_body(host, entry)
        ]

    return cores


_CORE_ROLES = {
    family: {f"{family}.{part}" for part in ("q", "k", "v", "qkv", "kv", "q_b", "kv_b")} for family in ("attn", "cross")
}


def _common(paths: list[list[str]]) -> list[str]:
    """Returns the names that all paths begin with."""
    same = takewhile(lambda steps: len(set(steps)) == 1, zip(*paths, strict=False))
    return [steps[0] for steps in same]


def _mlp_outputs(host: HostMap) -> list[HostEntry]:
    """Returns the down matrices. For a mixture of experts, returns the module that sums the experts, including shared
    experts, instead of the down matrices inside it."""
    sums: dict[str, HostEntry] = {}
    for entry in host.entries:
        if entry.role.startswith(("experts.", "router")) and _in_body(host, entry):
            place = enclosing(host, entry.path, "mlp")
            if place is not None:
                sums[place.path] = place
    downs = [
        entry
        for entry in host.by_role.get("mlp.down", [])
        if _in_body(host, entry) and sums.keys().isdisjoint(prefixes(entry.path))
    ]
    return [*sums.values(), *downs]


def _conv_outputs(host: HostMap) -> list[HostEntry]:
    """Returns the last convolution of each block without another branch."""
    branches = ("attn.output", "mlp.output", "ssm.output")
    others = {entry.block for role in branches for entry in VIRTUAL[role](host)}
    last: dict[str | None, HostEntry] = {}
    for entry in host.by_role.get("conv", []):
        if entry.block is not None and entry.block not in others and entry.kind == "conv":
            last[entry.block] = entry
    return list(last.values())


def prefixes(path: str) -> list[str]:
    steps = path.split(".")
    return [".".join(steps[:length]) for length in range(len(steps), 0, -1)]


VIRTUAL: dict[str, Callable[[HostMap], list[HostEntry]]] = {
    "all-linear": _all_linear,
    ALL_LAYERS: _all_layers,
    "attn.output": _attention_outputs,
    "attn.core": _cores("attn"),
    "cross.core": _cores("cross"),
    "mlp.output": _mlp_outputs,
    "ssm.output": lambda host: [entry for entry in host.by_role.get("ssm.out", []) if _in_body(host, entry)],
    "conv.output": _conv_outputs,
}
"""The rules that find the entries of each virtual role."""
