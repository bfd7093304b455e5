"""The host map: the role of each module of a host, and of each bare parameter (one that is not a module's `weight` or
`bias`), as data.

The map contains paths and names, but no modules. So it is valid for every model of the same structure, and can be
stored, compared and printed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from math import prod
from typing import Any

from peftcore.errors import TargetError
from peftcore.roles.entries import HostEntry, Slices
from peftcore.roles.tree import render
from peftcore.roles.virtual_roles import VIRTUAL, enclosing, prefixes
from peftcore.roles.vocabulary import OTHER, ROLES


def moved(entries: list[HostEntry], element: str, names: list[str]) -> Iterator[HostEntry]:
    """Yields copies of the entries of one list element, for the elements that follow it and are called `names`. Paths
    and layer numbers are adjusted."""
    inside, length, above = f"{element}.", len(element), element[: element.rfind(".") + 1]
    parts: list[tuple[dict[str, Any], list[tuple[str, str]], int | None]] = []
    for entry in entries:
        own = vars(entry)
        paths = [(key, own[key]) for key in ("path", "module", "tower", "block", "reader")]
        ends = [(key, path[length:]) for key, path in paths if path and f"{path}.".startswith(inside)]
        parts.append((own, ends, entry.layer if entry.block == element else None))
    for further, name in enumerate(names, 1):
        goal = above + name
        for own, ends, layer in parts:
            there = own.copy()
            for key, end in ends:
                there[key] = goal + end
            if layer is not None:
                there["layer"] = layer + further
            other = object.__new__(HostEntry)  # `replace` takes five times as long, and a host has many
            object.__setattr__(other, "__dict__", there)
            yield other


Selection = list[tuple[HostEntry, Slices | None]]

# The parts of fused weights, and of the second factors of low-rank pairs: MLA's make q, and k with v.
_PARTS = {
    "qkv": ("q", "k", "v"),
    "kv": ("k", "v"),
    "kv_b": ("k", "v"),
    "q_b": ("q",),
    "gate_up": ("gate", "up"),
}
_PARTS_OF = {role: _PARTS[part] for role in ROLES if (part := role.partition(".")[2]) in _PARTS} | {
    "attn_mlp.in": ("q", "k", "v", "gate", "up")
}


@dataclass(frozen=True)
class HostMap:
    """A map of roles to modules and parameters. `derive` builds a map, `probe` refines it, `override` corrects it."""

    entries: tuple[HostEntry, ...]
    """The entries of each module and each bare parameter, in the order of the host."""

    def __len__(self) -> int:
        return len(self.entries)

    @cached_property
    def by_role(self) -> dict[str, list[HostEntry]]:
        """The entries of each role, in the order of the host."""
        groups: dict[str, list[HostEntry]] = {}
        for entry in self.entries:
            groups.setdefault(entry.role, []).append(entry)
        return groups

    @cached_property
    def _by_path(self) -> dict[str, list[HostEntry]]:
        groups: dict[str, list[HostEntry]] = {}
        for entry in self.entries:
            groups.setdefault(entry.path, []).append(entry)
        return groups

    @cached_property
    def _order(self) -> dict[tuple[str, str], int]:
        return {(entry.path, entry.role): index for index, entry in enumerate(self.entries)}

    def at(self, path: str) -> tuple[HostEntry, ...]:
        """Returns the entries of one path. Usually there is one entry; a block that is also an attention has two."""
        return tuple(self._by_path.get(path, ()))

    def roles(self) -> frozenset[str]:
        """Returns every role that `select` accepts for this host: roles of weights and modules, of parts of fused
        weights, and virtual roles."""
        return self._held | {role for role in VIRTUAL if self.select(role)}

    def knows(self, role: str) -> bool:
        """Whether `select` accepts a role, or a family such as ``norm.*``, for this host."""
        if role.endswith(".*"):
            return any(f"{held}.".startswith(role[:-1]) for held in self._held)
        return role in self._held or (role in VIRTUAL and bool(self.select(role)))

    @cached_property
    def _held(self) -> frozenset[str]:
        """The roles of this host that are not virtual: roles of weights and modules, of parts of fused weights, and
        their families."""
        present = {role for role in self.by_role if role != OTHER}
        for fused in present & set(_PARTS_OF):
            present |= {role for entry in self.by_role[fused] for role in part_roles(entry)}
        families = {f"{role.partition('.')[0]}.*" for role in present if "." in role}
        return frozenset(present | families)

    def select(self, role: str, tower: str | None = None) -> Selection:
        """Returns the entries of a role in the order of the host. For a role that is a part of a fused weight, each
        entry is paired with the slices of that part; otherwise with None.

        * a role: "attn.q" finds the query matrices and the query slices of fused ones;
        * a family: "norm.*" finds the weights of every role with this prefix, and of "norm" itself (modules, if the
          role is one of modules);
        * a virtual role: "all-linear" finds every matrix inside blocks that is useful for linear adapters;
          "attn.output" and "mlp.output" find the modules whose output a branch adds to the residual stream; "attn.core"
          and "cross.core" find the modules that compute attention.

        Raises:
            TargetError: the role is a part of a fused weight whose slices are not known without a forward.
        """
        if role in VIRTUAL:
            found: Selection = [(entry, None) for entry in VIRTUAL[role](self)]
        elif role.endswith(".*"):
            family = role[:-2]
            names = [name for name in self.by_role if name == family or name.startswith(family + ".")]
            all_of_it = [entry for name in names for entry in self.by_role[name]]
            weights = [entry for entry in all_of_it if entry.kind != "container"]
            found = [(entry, None) for entry in weights or all_of_it]
        else:
            found = [(entry, None) for entry in self.by_role.get(role, [])] + self._parts(role)
        found.sort(key=lambda place: self._order[place[0].path, place[0].role])
        return [place for place in found if tower is None or place[0].tower == tower]

    def _parts(self, role: str) -> Selection:
        """Returns the slices of a role in fused weights."""
        found: Selection = []
        for fused in self.by_role.keys() & _PARTS_OF.keys():
            for entry in self.by_role[fused]:
                if role not in part_roles(entry):
                    continue
                if entry.layout is None:
                    raise TargetError(
                        f"the rows of {role!r} in {entry.path!r} are not known without a forward: target "
                        f"{entry.role!r} instead, which is the whole weight, or refine the map with "
                        "peftcore.roles.probe(model, inputs, host)"
                    )
                slices = entry.layout.slices(role.partition(".")[2])
                found.append((entry, None if slices == ((0, entry.rows),) else slices))
        return found

    @property
    def has_blocks(self) -> bool:
        """Whether the host has blocks that repeat along the depth."""
        return "block" in self.by_role

    def on_grid(self, block: str) -> bool:
        """Whether a block has convolutions in addition to attentions and feed-forwards, so that its hidden states are a
        grid with the features first (MaxViT) instead of a sequence."""
        return any(
            entry.block == block
            and entry.role == "conv"
            and len(entry.shape) > 3
            and entry.shape[1] > 1  # a depthwise one says nothing: TinyViT reshapes its sequence for it
            and not any(enclosing(self, entry.path, branch) for branch in ("attn", "cross", "mlp"))
            for entry in self.entries
        )

    def main_tower(self) -> str:
        """Returns the tower (sub-model) with the most parameters in its blocks."""
        sizes: dict[str, int] = {}
        for entry in self.entries:
            if entry.block is not None and entry.shape:
                sizes[entry.tower] = sizes.get(entry.tower, 0) + prod(entry.shape)
        return max(sizes, key=lambda tower: sizes[tower]) if sizes else ""

    @cached_property
    def named_towers(self) -> dict[str, tuple[str, ...]]:
        """The towers (sub-models with separate blocks) by kind of input: "vision", "audio" or "text". Patch embeddings
        and token stacks in a tower show its kind of input. A tower with several kinds is left out."""
        senses: dict[str, set[str]] = {}
        for entry in self.entries:
            if entry.role == "patch" or entry.role.startswith("stack"):
                senses.setdefault(entry.tower, set()).add(_sense(entry))
        named: dict[str, tuple[str, ...]] = {}
        for tower, found in senses.items():
            if len(found) == 1:
                [sense] = found
                named[sense] = (*named.get(sense, ()), tower)
        return named

    def override(self, roles: Mapping[str, str]) -> HostMap:
        """Returns the map with corrected roles. `roles` maps paths to their new roles; the role "other" removes a path
        from all roles.

        Raises:
            TargetError: the path is not in the host, or the role does not exist.
        """
        for path, role in roles.items():
            self._check(path, role)
        entries = []
        replaced = set()
        for entry in self.entries:
            if entry.path not in roles:
                entries.append(entry)
            elif entry.path not in replaced:
                replaced.add(entry.path)
                same = any(roles[entry.path] == old.role for old in self._by_path[entry.path])
                entries.append(replace(entry, role=roles[entry.path], layout=entry.layout if same else None))
        moved = any(role == "block" or entry.role == "block" for path, role in roles.items() for entry in self.at(path))
        return HostMap(tuple(reblocked(entries) if moved else entries))

    def _check(self, path: str, role: str) -> None:
        if path not in self._by_path:
            near = get_close_matches(path, self._by_path, n=3)
            hint = f" Did you mean {', '.join(map(repr, near))}?" if near else ""
            raise TargetError(f"the host has no module or bare parameter {path!r}.{hint}")
        if role != OTHER and role not in ROLES:
            near = get_close_matches(role, ROLES, n=3)
            hint = (
                f"did you mean {', '.join(map(repr, near))}?" if near else f"known roles: {', '.join(sorted(ROLES))}."
            )
            raise TargetError(f"{role!r} (for {path!r}) is not a role; {hint}")

    def tree(self) -> str:
        """Returns the map as text, with one line for each module or parameter with a role. Equal blocks share their
        lines."""
        return render(self)


def part_roles(entry: HostEntry) -> set[str]:
    """Returns the roles of the parts of a fused weight: those of its layout, or all possible parts of its role if the
    layout is unknown."""
    parts = entry.layout.names if entry.layout is not None else _PARTS_OF[entry.role]
    family = entry.role.partition(".")[0]
    if family != "attn_mlp":
        return {f"{family}.{part}" for part in parts} & ROLES
    return {f"mlp.{part}" if part in ("gate", "up") else f"attn.{part}" for part in parts}


def _sense(entry: HostEntry) -> str:
    """Returns the kind of input of a token stack ("text") or of a patch embedding ("audio" or "vision"). Kernels for
    audio have one dimension."""
    if entry.role != "patch":
        return "text"
    return "audio" if len(entry.shape) == 3 else "vision"


def under(path: str, top: str) -> bool:
    return not top or path == top or path.startswith(top + ".")


def reblocked(entries: list[HostEntry]) -> list[HostEntry]:
    """Returns the entries with `block` and `layer` recomputed from the entries that have the role "block"."""
    layers: dict[str, int] = {}
    counts: dict[str, int] = {}
    for entry in entries:
        if entry.role == "block":
            owner = entry.path.rpartition(".")[0]
            layers[entry.path] = counts.setdefault(owner, 0)
            counts[owner] += 1
    renewed = []
    for entry in entries:
        block = next((prefix for prefix in prefixes(entry.path) if prefix in layers), None)
        renewed.append(replace(entry, block=block, layer=layers[block] if block is not None else None))
    return renewed
