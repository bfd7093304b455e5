"""From what a user calls a target to sites: globs, suffixes, regular expressions, roles, types and predicates.

A string is read in this order: ``re:...`` is a regular expression for the whole path; one with ``* ? [`` is a glob for
the whole path (``*`` crosses dots); a role that the host map knows is that role; anything else is the end of a path.
What matches no module is tried on parameters (``"*.in_proj_bias"``). Roles know the rows of fused projections; the
other forms take whole modules. ``vision:``, ``text:`` or ``audio:`` in front of any of them means the towers that take
that in, and no others: ``vision:attn.q``.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from peftcore.errors import HostMismatch, TargetError, UnsupportedSite, shown
from peftcore.graft import effective_weight
from peftcore.hosts import HostEntry, HostMap
from peftcore.weights import Layer, Ranges, dense_layer

Target = str | type[nn.Module] | Callable[[str, nn.Module], bool] | Sequence[Any]
LayerOf = Callable[[nn.Module, str], Layer]


_SHAPES: WeakKeyDictionary[Site, torch.Size] = WeakKeyDictionary()
"""Shapes of sites: methods ask for them many times. Not among a site's attributes, from which others are made."""


@dataclass(frozen=True, eq=False)
class Site:
    """A module of the host, one of its tensors, or some rows of one, that a method acts on.

    Attributes:
        module_path: path of the module, "" for the host itself.
        tensor: path of the tensor below the module; "weight" for most.
        role: the role by which it was found, if any.
        rows: the rows of the logical output dimension, for one part of a fused projection.
        form: "activation" where an operator may wrap the module's forward, "weight" where only the tensor can be acted
            on; "attention" for what acts inside an attention module.
    """

    module: nn.Module
    module_path: str
    tensor: str
    layer: Layer
    role: str | None = None
    rows: Ranges | None = None
    form: str = "weight"
    layer_of: LayerOf = dense_layer
    meta: bool = False

    @property
    def path(self) -> str:
        """The name of the site in files and messages: ``h.0.attn.c_attn``, ``mha.in_proj_weight``,
        ``h.0.attn.c_attn:attn.q``."""
        if self.form == "attention":
            return f"{self.module_path}:attention"
        plain = self.tensor == "weight" or self.form == "activation"
        path = self.module_path if plain else f"{self.module_path}.{self.tensor}".lstrip(".")
        return path if self.rows is None else f"{path}:{self.role or self.rows[0][0]}"

    @property
    def weight_shape(self) -> torch.Size:
        """The logical shape ``[*batch, out, in, *kernel]``, also when the weight is packed; rows only."""
        found = _SHAPES.get(self)
        if found is None:
            found = _SHAPES[self] = self._weight_shape()
        return found

    def _weight_shape(self) -> torch.Size:
        if not self.layer.has(self.module, self.tensor):
            return torch.Size([self._beside().out_features])
        shape = list(self.layer.shape(self.module, self.tensor))
        if self.rows is not None:
            shape[self.layer.batch_dims] = sum(stop - start for start, stop in self.rows)
        return torch.Size(shape)

    @property
    def batch(self) -> tuple[int, ...]:
        """The leading dimensions of a stack: ``(experts,)``, or nothing."""
        return tuple(self.weight_shape[: self.layer.batch_dims])

    @property
    def out_features(self) -> int:
        """Outputs of the linear map, or the length of a vector."""
        return self.weight_shape[self.layer.batch_dims]

    @property
    def in_features(self) -> int:
        """Inputs of the linear map (of one group, for grouped convolutions)."""
        return self._matrix()[0]

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel of a convolution, or nothing."""
        return tuple(self._matrix()[1:])

    @property
    def numel(self) -> int:
        """Values in the tensor (or in its rows)."""
        return math.prod(self.weight_shape)

    def _matrix(self) -> torch.Size:
        inputs = self.weight_shape[self.layer.batch_dims + 1 :]
        if not inputs:
            raise UnsupportedSite(f"{self.path} is a vector of {self.out_features}; this method needs a matrix")
        return inputs

    @property
    def device(self) -> torch.device:
        """Where the module computes."""
        held: Tensor | None = next(self.module.parameters(), None)
        if self.layer.has(self.module, self.tensor):
            held = self.layer.like(self.module, self.tensor)
        return torch.device("cpu") if held is None else held.device

    def weight(self) -> Tensor:
        """The dense logical weight as the active injections leave it; zeros for a missing bias, shape only while
        planning."""
        self.layer.check_readable(self.module, self.tensor)
        if self.meta:
            return torch.empty(self.weight_shape, device="meta")
        if not self.layer.has(self.module, self.tensor):
            return self._beside().weight().new_zeros(self.weight_shape)
        return effective_weight(self.module, self.tensor, self.layer, self.rows)

    def _beside(self) -> Site:
        """The weight beside a bias that the host does not have."""
        owner, _, name = self.tensor.rpartition(".")
        if name != "bias":
            raise UnsupportedSite(f"{self.module_path or 'the host'} has no tensor {self.tensor!r} to act on")
        return self.at(f"{owner}.weight".lstrip("."))

    def tensors(self) -> tuple[str, ...]:
        """The parameter slots beside the site's tensor, by path below the module; empty ones (no bias) included."""
        owner = self.tensor.rpartition(".")[0]
        module = self.module.get_submodule(owner)
        return tuple(f"{owner}.{name}".lstrip(".") for name in self.layer_of(module, "weight").slots(module))

    def missing(self, tensor: str) -> bool:
        """True for a parameter slot that the host left empty."""
        return not self.layer_of(self.module, tensor).has(self.module, tensor)

    def at(self, tensor: str) -> Site:
        """The same rows of another tensor of the module."""
        return replace(self, tensor=tensor, layer=self.layer_of(self.module, tensor), form="weight")


def _matcher(pattern: Any) -> Callable[[str, nn.Module | None], bool]:
    """A predicate for one target that is not a role."""
    if isinstance(pattern, type):
        return lambda path, module: isinstance(module, pattern)
    if callable(pattern):
        return lambda path, module: module is not None and bool(pattern(path, module))
    if pattern.startswith("re:"):
        try:
            compiled = re.compile(pattern[3:])
        except re.error as error:
            raise TargetError(f"target {pattern!r} is no regular expression: {error}") from None
        return lambda path, module: compiled.fullmatch(path) is not None
    if any(character in pattern for character in "*?["):
        return lambda path, module: fnmatch.fnmatchcase(path, pattern)
    return lambda path, module: path == pattern or path.endswith(f".{pattern}")


def _each(target: Target) -> Iterator[Any]:
    if isinstance(target, str | type) or callable(target):
        yield target
    elif isinstance(target, Iterable):
        for part in target:
            yield from _each(part)
    else:
        raise TargetError(f"target {target!r} is no name, role, pattern, type or predicate")


class Resolver:
    """Finds sites in one host. Operators of other injections are never seen as targets."""

    def __init__(self, model: nn.Module, host: HostMap, layer_of: LayerOf, hidden: Callable[[nn.Module], bool]) -> None:
        self.model, self.host, self.layer_of = model, host, layer_of
        self.modules = dict(_visible(model, "", hidden, set()))
        self._order = {path: index for index, path in enumerate(self.modules)}
        self._roles = host.roles()
        self._role_of = {entry.path: entry.role for entry in host.entries}
        self._tower_of = {entry.module: entry.tower for entry in host.entries}
        self._readers = {entry.module: entry.reader for entry in host.entries if entry.reader is not None}
        self._holders: dict[int, list[tuple[str, str]]] | None = None

    def sites(
        self, target: Target, *, exclude: Target | None = None, tower: str | None = None
    ) -> tuple[list[Site], list[Any]]:
        """The sites of a target, in the host's order, without those of `exclude`; and the parts of the target that
        match nothing.

        Raises:
            TargetError: nothing matches, or everything was excluded.
        """
        found: dict[str, Site] = {}
        unmatched: list[Any] = []
        for pattern in _each(target):
            matched = list(self._match(pattern, tower))
            found.update((site.path, site) for site in matched)
            if not matched:
                unmatched.append(pattern)
        if not found:
            raise TargetError(self._nothing(*unmatched))
        if exclude is not None:
            out = {path for pattern in _each(exclude) for path in self._excluded(pattern)}
            found = {path: site for path, site in found.items() if path not in out and out.isdisjoint(_above(path))}
            if not found:
                raise TargetError(f"exclude={exclude!r} leaves nothing of target={target!r}")
        return sorted(found.values(), key=lambda site: self._order[site.module_path]), unmatched

    def _excluded(self, pattern: Any) -> set[str]:
        """Paths of sites, and of whole modules where the pattern means modules: what is below those is left out too."""
        out = {site.path for site in self._match(pattern, None)}
        if not self._is_role(self._split(pattern)[1]):
            out |= {path for path in self._modules_of(pattern) if path}
        return out

    def holders(self, tensor: nn.Parameter) -> list[tuple[str, str]]:
        """Every (module path, name) that holds this very parameter."""
        if self._holders is None:
            self._holders = {}
            for path, module in self.modules.items():
                for name, value in module._parameters.items():
                    self._holders.setdefault(id(value), []).append((path, name))
        return self._holders.get(id(tensor), [])

    def module_site(self, path: str) -> Site:
        """The site of a whole module or of one parameter by exact path."""
        if path in self.modules:
            return self._whole(path)
        owner, _, tensor = path.rpartition(".")
        if owner in self.modules and tensor in self.modules[owner]._parameters:
            return self.site(owner, tensor)
        raise TargetError(self._nothing(path))

    def site(self, module_path: str, tensor: str, role: str | None = None, rows: Ranges | None = None) -> Site:
        """One site, described exactly; what is read without being called is a tensor of the module above that reads
        it."""
        parent, _, leaf = module_path.rpartition(".")
        attention = leaf == "out_proj" and isinstance(self.modules.get(parent), nn.MultiheadAttention)
        reader = parent if attention else self._readers.get(module_path)
        if reader is not None:
            module_path, tensor = reader, f"{module_path}.{tensor}".removeprefix(f"{reader}.")
        module = self.modules[module_path]
        output = role is not None and role.endswith(".output")  # the operator acts on what the module returns
        layer = self.layer_of(module, tensor)
        whole = tensor == "weight" and not layer.has(module, tensor)  # a module without a weight of its own
        form = "activation" if output or whole or (layer.called and tensor == "weight") else "weight"
        if role is None:
            role = self._role_of.get(module_path if tensor == "weight" else f"{module_path}.{tensor}")
        return Site(module, module_path, tensor, layer, role, rows, form, self.layer_of)

    def recorded(self, module_path: str, tensor: str, role: str | None = None, rows: Ranges | None = None) -> Site:
        """A site as a file tells of it.

        Raises:
            HostMismatch: the host has no such module, tensor, or rows.
        """
        module = self.modules.get(module_path)
        if module is None:
            raise HostMismatch(f"the adapter belongs to another base: there is no {module_path!r} here")
        owner = self.modules.get(f"{module_path}.{tensor.rpartition('.')[0]}".strip("."))
        if owner is None or (tensor != "weight" and tensor.rpartition(".")[2] not in self._slots(module, tensor)):
            raise HostMismatch(f"the adapter belongs to another base: {module_path!r} has no {tensor!r} here")
        site = self.site(module_path, tensor, role, rows)
        if rows is not None:
            height = replace(site, rows=None).out_features
            ends = [end for pair in rows for end in pair]
            empty = any(start >= stop for start, stop in rows)
            if not rows or empty or ends != sorted(ends) or ends[-1] > height:
                raise HostMismatch(f"{module_path} has {height} rows here, the adapter stands at {shown(rows)}")
        return site

    def _slots(self, module: nn.Module, tensor: str) -> Iterable[str]:
        owner = module.get_submodule(tensor.rpartition(".")[0])
        return self.layer_of(owner, "weight").slots(owner)

    def has_parameter(self, path: str) -> bool:
        """Whether a module has a place for a parameter of exactly that path (it may be empty)."""
        owner, _, tensor = path.rpartition(".")
        return owner in self.modules and tensor in self._slots(self.modules[owner], tensor)

    def _whole(self, path: str, role: str | None = None) -> Site:
        return self.site(path, self._own_tensor(path), role)

    def _own_tensor(self, path: str) -> str:
        return "in_proj_weight" if isinstance(self.modules[path], nn.MultiheadAttention) else "weight"

    def _match(self, pattern: Any, tower: str | None) -> Iterator[Site]:
        towers, inner = self._split(pattern)
        if self._is_role(inner):
            for each in (tower,) if towers is None else towers:
                for entry, rows in self.host.select(inner, each):
                    yield self._of_entry(entry, inner, rows)
            return
        paths = self._modules_of(pattern)
        yield from (self._whole(path) for path in paths)
        if not paths:
            matches = _matcher(inner)
            for owner in self._inside(towers):
                for name in self.modules[owner]._parameters:
                    if matches(f"{owner}.{name}".lstrip("."), None):
                        yield self.site(owner, name)

    def _split(self, pattern: Any) -> tuple[tuple[str, ...] | None, Any]:
        """The towers that a pattern means, None for all, and the rest of it."""
        if isinstance(pattern, str):
            sense, colon, rest = pattern.partition(":")
            if colon and sense in self.host.named_towers:
                return self.host.named_towers[sense], rest
        return None, pattern

    def _inside(self, towers: tuple[str, ...] | None) -> list[str]:
        """The modules of some towers."""
        return [path for path in self.modules if towers is None or self._tower_of.get(path) in towers]

    def _modules_of(self, pattern: Any) -> list[str]:
        """The modules that a pattern which is no role means."""
        towers, inner = self._split(pattern)
        matches = _matcher(inner)
        return [path for path in self._inside(towers) if matches(path, self.modules[path])]

    def _is_role(self, pattern: Any) -> bool:
        """A role of this host, or a family such as ``norm.*`` (which is never a path: paths have an owner before the
        dot)."""
        if not isinstance(pattern, str):
            return False
        family = pattern.removesuffix(".*")
        return pattern in self._roles or (
            family != pattern and any(r == family or r.startswith(f"{family}.") for r in self._roles)
        )

    def _of_entry(self, entry: HostEntry, role: str, rows: Ranges | None) -> Site:
        if role.endswith(".output"):
            return self.site(entry.module, entry.tensor or self._last_matrix(entry), role, rows)
        named = entry.role if role.endswith("*") or role == "all-linear" else role
        return self.site(entry.module, entry.tensor or self._own_tensor(entry.module), named, rows)

    def _last_matrix(self, entry: HostEntry) -> str:
        """The tensor below a module from which its output comes: its own weight, or its experts' second matrices."""
        if self.modules[entry.module]._parameters.get("weight") is not None:
            return "weight"
        prefix = f"{entry.module}."
        inside = (
            e.path
            for e in self.host.entries
            if e.path.startswith(prefix) and e.role in ("experts.down", "attn.out", "mlp.down")
        )
        path = next(inside, f"{prefix}weight").removeprefix(prefix)
        return (
            path
            if path == "weight" or path.rpartition(".")[2] in self._leaf_tensors(entry.module, path)
            else f"{path}.weight"
        )

    def _leaf_tensors(self, module: str, path: str) -> dict[str, Any]:
        owner = f"{module}.{path.rpartition('.')[0]}".rstrip(".")
        return self.modules[owner]._parameters

    def _nothing(self, *patterns: Any) -> str:
        leaves = sorted({path.rpartition(".")[2] for path in self.modules if path})
        names = [*sorted(self._roles), *leaves]
        close = [c for p in patterns for c in difflib.get_close_matches(str(p), names, n=3, cutoff=0.5)]
        shown = ", ".join(map(repr, patterns))
        hint = f"; close: {', '.join(close)}" if close else ""
        roles = ", ".join(sorted(r for r in self._roles if not r.endswith("*"))) or "none"
        towers = ", ".join(f"{sense}:" for sense in sorted(self.host.named_towers))
        its = f"Its roles: {roles}" + (f". Its towers: {towers}" if towers else "")
        return f"target {shown} matches nothing in this {type(self.model).__name__}{hint}. {its}"


def _above(path: str) -> Iterator[str]:
    """The whole tensor of a part, and every module above a path."""
    path = path.partition(":")[0]
    while path:
        yield path
        path = path.rpartition(".")[0]


def _visible(
    module: nn.Module, path: str, hidden: Callable[[nn.Module], bool], seen: set[int]
) -> Iterable[tuple[str, nn.Module]]:
    if id(module) in seen or hidden(module) or isinstance(module, torch.jit.ScriptModule):
        return
    seen.add(id(module))
    yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _visible(child, f"{path}.{name}" if path else name, hidden, seen)
