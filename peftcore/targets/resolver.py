"""Resolves targets to sites: globs, suffixes, regular expressions, roles, types and predicates.

A string is interpreted in this order: ``re:...`` is a regular expression for the whole path; a string with ``* ? [`` is
a glob for the whole path (``*`` also matches dots); a name of a role in the host map is that role; any other string is
the end of a path. A pattern that matches no module is tried on parameters (``"*.in_proj_bias"``). Roles select slices
of fused projections; the other forms take whole modules. ``vision:``, ``text:`` or ``audio:`` in front of any of them
selects only the towers that take such inputs: ``vision:attn.q``. Modules inside a parametrization compute a weight and
cannot be targets.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import nn
from torch.jit import ScriptModule
from torch.nn.utils.parametrize import is_parametrized

from peftcore.errors import HostMismatch, TargetError, UnsupportedSite, shown
from peftcore.layers.adapter_modules import AdapterModules
from peftcore.layers.layer import Layer, Slices, plain_class
from peftcore.roles import HostEntry, HostMap
from peftcore.roles.block_calls import CodeReader
from peftcore.roles.branch_ends import End, find_end
from peftcore.roles.equal_modules import Structure
from peftcore.roles.stacks import TokenStack, find
from peftcore.roles.virtual_roles import ALL_LAYERS, VIRTUAL
from peftcore.roles.vocabulary import ROLES
from peftcore.targets.sites import SEVERAL, LayerOf, Site

UNSEEN = (AdapterModules, ScriptModule)
"""Modules that are never targets, including all modules inside them."""
KINDS = 8
"""The number of structures that are cached for modules of one class and shape."""
Target = str | type[nn.Module] | Callable[[str, nn.Module], bool] | Sequence[Any]


def _matcher(pattern: Any) -> Callable[[str, nn.Module | None], bool]:
    """Returns a predicate for one target that is not a role."""
    if isinstance(pattern, type):
        return lambda path, module: isinstance(module, pattern)
    if callable(pattern):
        return lambda path, module: module is not None and bool(pattern(path, module))
    if pattern.startswith("re:"):
        try:
            compiled = re.compile(pattern[3:])
        except re.error as error:
            raise TargetError(f"target {pattern!r} is not a regular expression: {error}") from None
        return lambda path, module: compiled.fullmatch(path) is not None
    if not _is_ending(pattern):
        return lambda path, module: fnmatch.fnmatchcase(path, pattern)
    ending = f".{pattern}"
    return lambda path, module: path.endswith(ending) or path == pattern


def _is_ending(pattern: Any) -> bool:
    """Whether a target that is not a role is the end of a path."""
    return isinstance(pattern, str) and not pattern.startswith("re:") and not any(each in pattern for each in "*?[")


def _each(target: Target) -> Iterator[Any]:
    if isinstance(target, str | type) or callable(target):
        yield target
    elif isinstance(target, Iterable):
        for part in target:
            yield from _each(part)
    else:
        raise TargetError(f"target {target!r} is not a name, role, pattern, type or predicate")


class Resolver:
    """Finds sites in one host. Operators of other injections are never targets."""

    def __init__(self, model: nn.Module, host: HostMap, layer_of: LayerOf) -> None:
        self.model, self.host, self.layer_of = model, host, layer_of
        self.modules: dict[str, nn.Module] = {}
        """All modules by path: possible targets, and modules inside parametrizations."""
        self._hidden: set[str] = set()
        """The paths of the modules inside parametrizations."""
        self._see(model, "", set())
        self._order = {path: index for index, path in enumerate(self.modules)}
        self._role_of = {entry.path: entry.role for entry in host.entries}
        self._among_experts = {entry.path for entry in host.entries if entry.among_experts}
        self._readers = {entry.module: entry.reader for entry in host.entries if entry.reader is not None}
        self._holders: dict[int, list[tuple[str, str]]] | None = None
        self._layers: dict[tuple[Any, ...], list[tuple[Structure, Layer]]] = {}
        """Known layers by class, tensor and shape, with the structure of their modules."""

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state for copies, without the cached layers."""
        return {**self.__dict__, "_layers": {}}

    def _see(self, module: nn.Module, path: str, seen: set[int], hidden: bool = False) -> None:
        """Record a module and all its submodules, each once."""
        if id(module) in seen or isinstance(module, UNSEEN):
            return
        seen.add(id(module))
        self.modules[path] = module
        if hidden:
            self._hidden.add(path)
        if module._modules:
            prefix = f"{path}." if path else ""
            for name, child in module._modules.items():
                if child is not None:
                    inside = hidden or (name == "parametrizations" and is_parametrized(module))
                    self._see(child, prefix + name, seen, inside)

    def parameters(self) -> list[nn.Parameter]:
        """Returns the host's parameters, without those of adapters; a shared parameter occurs once for each module that
        holds it."""
        modules = self.modules.values()
        return [each for module in modules for each in module._parameters.values() if each is not None]

    def sites(self, target: Target, *, exclude: Target | None = None) -> list[Site]:
        """Returns the sites of a target, in the host's order, without those of `exclude`.

        Raises:
            TargetError: a part of the target matches nothing, or all sites were excluded.
            UnsupportedSite: a site is the output of experts whose width cannot be read from their matrices.
        """
        found, unmatched = self.matching(target, None)
        if unmatched or not found:
            raise TargetError(self.nothing("target", *unmatched))
        return self.without(found, target, exclude)

    def matching(self, target: Target, tower: str | None) -> tuple[dict[str, Site], list[Any]]:
        """Returns the sites of a target by path, and the parts of the target that match nothing.

        Raises:
            TargetError: the target names slices of a fused weight that are not known without a forward.
        """
        found: dict[str, Site] = {}
        unmatched: list[Any] = []
        for pattern in _each(target):
            matched = list(self._match(pattern, tower))
            found.update((site.path, site) for site in matched)
            if not matched:
                unmatched.append(pattern)
        return found, unmatched

    def without(self, found: dict[str, Site], target: Target, exclude: Target | None) -> list[Site]:
        """Returns the sites of a target, in the host's order, without those of `exclude`.

        Raises:
            TargetError: all sites were excluded.
            UnsupportedSite: a site is the output of experts whose width cannot be read from their matrices.
        """
        if exclude is not None:
            out = {path for pattern in _each(exclude) for path in self._excluded(pattern)}
            found = {path: site for path, site in found.items() if path not in out and out.isdisjoint(_above(path))}
            if not found:
                raise TargetError(
                    f"exclude={exclude!r} excludes everything that target={target!r} selects; change one of them"
                )
        for site in found.values():
            if site.form == "activation" and f"{site.module_path}.{site.tensor}" in self._flat_experts:
                raise UnsupportedSite(
                    f"{site.module_path} stores the rows of all its experts in one matrix, {site.tensor} of "
                    f"{tuple(site.weight_shape)}, so the width of its output is unknown: "
                    f"exclude=[{site.module_path.rpartition('.')[2]!r}]"
                )
        return sorted(found.values(), key=lambda site: self._order[site.module_path])

    @cached_property
    def _flat_experts(self) -> set[str]:
        """The last matrices of experts that store the rows of all experts concatenated in one matrix (DBRX)."""
        return {e.path for e in self.host.entries if e.role == "experts.down" and e.tensor and len(e.shape) == 2}

    def idle(self, exclude: Target) -> list[Any]:
        """Returns the parts of `exclude` that match nothing in the host.

        Raises:
            TargetError: as `matching`.
        """
        return [pattern for pattern in _each(exclude) if not self._excluded(pattern)]

    def _excluded(self, pattern: Any) -> set[str]:
        """Returns the paths of the sites that a pattern of `exclude` matches. If the pattern names modules, their paths
        are included too, since all sites below them are excluded."""
        out = {site.path for site in self._match(pattern, None)}
        if not self._is_role(self._split(pattern)[1]):
            out |= {path for path in self._modules_of(pattern) if path}
        return out

    def holders(self, tensor: nn.Parameter) -> list[tuple[str, str]]:
        """Returns every (module path, name) that holds the given parameter object."""
        if self._holders is None:
            self._holders = {}
            for path, module in self.modules.items():
                for name, value in module._parameters.items():
                    self._holders.setdefault(id(value), []).append((path, name))
        return self._holders.get(id(tensor), [])

    def token_stacks(self) -> list[TokenStack]:
        """Returns the stacks of the host: modules that take token ids, embed them and run blocks."""
        return find(self.modules, self.host.entries)

    def end_of(self, path: str) -> End | None:
        """Returns the point at which the output of a branch (attention or MLP) is added to the hidden states. `path` is
        the path of the branch's last matrix or of the whole branch; for other paths, returns None."""
        if path not in self._branches:
            return None
        return find_end(self.modules, path, self._branches[path], plain_class)

    @cached_property
    def _branches(self) -> dict[str, str | None]:
        """The paths of the last matrices of branches and of whole branches, each with the path of its block."""
        entries = [entry for role in VIRTUAL if role.endswith(".output") for entry, _ in self.host.select(role)]
        entries += [entry for role in ("attn", "cross", "mlp", "ssm") for entry in self.host.by_role.get(role, [])]
        return {entry.module: entry.block for entry in entries if entry.module != entry.block}

    def module_site(self, path: str) -> Site:
        """Returns the site of a whole module or of one parameter by exact path.

        Raises:
            TargetError: the host has neither a module nor a parameter of this path.
        """
        if path in self.modules:
            return self._whole(path)
        owner, _, tensor = path.rpartition(".")
        if owner in self.modules and tensor in self.modules[owner]._parameters:
            return self.site(owner, tensor)
        raise TargetError(self.nothing("target", path))

    def site(self, module_path: str, tensor: str, role: str | None = None, slices: Slices | None = None) -> Site:
        """Returns one site by its exact path. If another module reads the weight at this path without calling its
        module, the site is a tensor of that other module."""
        parent, _, leaf = module_path.rpartition(".")
        attention = leaf == "out_proj" and isinstance(self.modules.get(parent), nn.MultiheadAttention)
        reader = parent if attention else self._readers.get(module_path)
        if reader is not None:
            module_path, tensor = reader, f"{module_path}.{tensor}".removeprefix(f"{reader}.")
        module = self.modules[module_path]
        output = role is not None and role.endswith(".output")  # the operator acts on the module's output
        layer = self._layer(module, tensor)
        whole = tensor == "weight" and not layer.has(module, tensor)  # a module without a weight of its own
        around = output or whole or (layer.called and tensor == "weight")
        form = "activation" if around and not layer.in_pieces else "weight"
        if role is None:
            role = self._role_of.get(module_path if tensor == "weight" else f"{module_path}.{tensor}")
        chosen = module_path in self._among_experts
        return Site(
            module, module_path, tensor, layer, role, slices, form, self.layer_of,
            turned=self.is_turned, among_experts=chosen,
        )  # fmt: skip

    @cached_property
    def _code(self) -> CodeReader:
        return CodeReader(self.modules, plain_class)

    @cached_property
    def _block_of(self) -> dict[str, str]:
        return {entry.module: entry.block for entry in self.host.entries if entry.block is not None}

    def is_turned(self, path: str) -> bool:
        """Whether a module receives inputs with tokens as the first dimension; for a module in a block, whether its
        block does."""
        return self._code.tokens_first(self._block_of.get(path, path))

    def check_runs_once(self, block: str) -> bool:
        """Verify that one forward runs a block once. Methods that store a value of the block or add to its output once
        per forward need this.

        Returns:
            True if the host's code shows it; otherwise the first forward has to check it (`Site.once`).

        Raises:
            UnsupportedSite: the block runs several times, for several layers.
        """
        tower = next((entry.tower for entry in self.host.at(block) if entry.role == "block"), "")
        runs = self._code.of(block, tower).runs
        if runs == "several":
            raise UnsupportedSite(f"{block} {SEVERAL}")
        return runs == "once"

    def _layer(self, module: nn.Module, tensor: str) -> Layer:
        """Returns the layer of a tensor (how the module stores it). The result is cached for all modules with the same
        structure."""
        held = module._parameters.get(tensor)
        known = self._layers.setdefault((type(module), tensor, None if held is None else held.shape), [])
        for structure, layer in known:
            if structure.fits(module):
                return layer
        layer = self.layer_of(module, tensor)
        if len(known) < KINDS:
            known.append((Structure(module), layer))
        return layer

    def recorded(self, module_path: str, tensor: str, role: str | None = None, slices: Slices | None = None) -> Site:
        """Returns the site that a file describes by its path, tensor and slices.

        Raises:
            HostMismatch: the host lacks the module, the tensor or the slices.
        """
        module = self.modules.get(module_path)
        if module is None:
            raise HostMismatch(f"the adapter belongs to another base: this host has no module {module_path!r}")
        owner = self.modules.get(f"{module_path}.{tensor.rpartition('.')[0]}".strip("."))
        if owner is None or (tensor != "weight" and tensor.rpartition(".")[2] not in self._slots(module, tensor)):
            raise HostMismatch(
                f"the adapter belongs to another base: the module {module_path!r} has no tensor {tensor!r} here"
            )
        site = self.site(module_path, tensor, role, slices)
        if slices is not None:
            height = replace(site, slices=None).out_features
            ends = [end for pair in slices for end in pair]
            empty = any(start >= stop for start, stop in slices)
            if not slices or empty or ends != sorted(ends) or ends[-1] > height:
                raise HostMismatch(
                    f"the adapter belongs to another base: {module_path} has {height} rows, but the adapter changes "
                    f"rows {shown(slices)}"
                )
        return site

    def _slots(self, module: nn.Module, tensor: str) -> Iterable[str]:
        owner = module.get_submodule(tensor.rpartition(".")[0])
        return self.layer_of(owner, "weight").slots(owner)

    def has_parameter(self, path: str) -> bool:
        """Whether a module registers a parameter at exactly the given path; the parameter may be None."""
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
                for entry, slices in self.host.select(inner, each):
                    yield self._of_entry(entry, inner, slices)
            return
        paths = self._modules_of(pattern)
        yield from (self._whole(path) for path in paths)
        if not paths:
            matches = _matcher(inner)
            for owner in self._inside(towers, self.modules):
                if owner in self._hidden:
                    continue
                for name in self.modules[owner]._parameters:
                    if matches(f"{owner}.{name}".lstrip("."), None):
                        yield self.site(owner, name)

    def _split(self, pattern: Any) -> tuple[tuple[str, ...] | None, Any]:
        """Returns the towers that a pattern selects (None for all) and the rest of the pattern."""
        if isinstance(pattern, str):
            sense, colon, rest = pattern.partition(":")
            if colon and sense in self.host.named_towers:
                return self.host.named_towers[sense], rest
        return None, pattern

    @cached_property
    def _tower_of(self) -> dict[str, str]:
        return {entry.module: entry.tower for entry in self.host.entries}

    def _inside(self, towers: tuple[str, ...] | None, paths: Iterable[str]) -> list[str]:
        """Returns the paths that are in some towers."""
        return [path for path in paths if towers is None or self._tower_of.get(path) in towers]

    def _modules_of(self, pattern: Any) -> list[str]:
        """Returns the paths of modules that match a pattern which is not a role."""
        towers, inner = self._split(pattern)
        matches = _matcher(inner)
        paths = self._by_name.get(inner.rpartition(".")[2], ()) if _is_ending(inner) else self.modules
        return [
            path
            for path in self._inside(towers, paths)
            if path not in self._hidden and matches(path, self.modules[path])
        ]

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        """The paths of modules by their last step."""
        found: dict[str, list[str]] = {}
        for path in self.modules:
            found.setdefault(path.rpartition(".")[2], []).append(path)
        return found

    def _is_role(self, pattern: Any) -> bool:
        """Whether a pattern is a role of this host, or a family such as ``norm.*`` (which is never a path: paths have
        an owner before the dot)."""
        return isinstance(pattern, str) and self.host.knows(pattern)

    def _of_entry(self, entry: HostEntry, role: str, slices: Slices | None) -> Site:
        if role.endswith(".output"):
            return self.site(entry.module, entry.tensor or self._last_matrix(entry), role, slices)
        named = entry.role if role.endswith("*") or role.startswith("all-") else role
        return self.site(entry.module, entry.tensor or self._own_tensor(entry.module), named, slices)

    def _last_matrix(self, entry: HostEntry) -> str:
        """Returns the tensor below a module that computes its output: the module's weight, or the second matrices of
        its experts."""
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

    def nothing(self, argument: str, *patterns: Any) -> str:
        """Returns the error message for patterns that match nothing; `argument` is the name of the argument that has
        them."""
        known, name = self.host.roles(), type(self.model).__name__
        names = list(known | {path.rpartition(".")[2] for path in self.modules if path not in self._hidden} - {""})
        misspelt = [inner for inner in (self._split(each)[1] for each in patterns) if not names_a_role(inner)]
        near = [
            close for inner in misspelt for close in difflib.get_close_matches(str(inner), sorted(names), cutoff=0.5)
        ]
        hint = f"; similar names: {', '.join(dict.fromkeys(near))}" if near else ""
        if patterns and not misspelt and ALL_LAYERS in known:
            hint = (
                f": it has no such roles. {argument}={ALL_LAYERS!r} selects every matrix and convolution of its blocks"
            )
        shown = ", ".join(each.__name__ if isinstance(each, type) else repr(each) for each in patterns)
        roles = ", ".join(sorted(role for role in known if not role.endswith("*"))) or "none"
        towers = ", ".join(f"{sense}:" for sense in sorted(self.host.named_towers))
        its = f"Its roles: {roles}" + (f". Its towers: {towers}" if towers else "")
        return f"{argument} {shown} matches nothing in this {name}{hint}. {its}"


def names_a_role(pattern: Any) -> bool:
    """Whether a target is a role, of this host or of another one."""
    if not isinstance(pattern, str):
        return False
    family = pattern.endswith(".*") and any(role.startswith(pattern[:-1]) for role in ROLES)
    return family or pattern in ROLES or pattern in VIRTUAL


def _above(path: str) -> Iterator[str]:
    """Yields a path without its part (the text after the colon), and the paths of all modules above it."""
    path = path.partition(":")[0]
    while path:
        yield path
        path = path.rpartition(".")[0]
