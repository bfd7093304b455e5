"""Merges an injection into the host's tensors, and unmerges it exactly.

Deltas are computed in float32 (float64 for float64 hosts) and cast once. Either all tensors are written or none. New
tensors replace those of the host (`merge_writes`), and the originals are kept in the requested form (`originals`).

A merge converts a quantized weight to a dense one, or packs it again and reports the measured error. The quantized
codes are kept to restore the weight. A weight that its module computes from other tensors, such as a weight norm, stays
computed if the computation can produce the merged value. Otherwise a plain parameter replaces it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from peftcore.contract.operators import is_mergeable
from peftcore.errors import ConfigError, InactiveSite, MergeError, NotMergeable, UnsupportedSite
from peftcore.forward.choice.merged_choice import check_merge, check_unread, places
from peftcore.forward.tensors.mount import Effect, Mount, effects_of, fold
from peftcore.injection.fold_parametrizations import fold as fold_away
from peftcore.injection.fold_parametrizations import inverted
from peftcore.injection.freezing import thaw
from peftcore.injection.merge_writes import (
    Folded,
    Holders,
    Key,
    MergeWrite,
    Overwritten,
    QuantizedLayerWrite,
    Replaced,
    held,
    holders_of,
    modules_of,
    owner_path,
)
from peftcore.injection.originals import Fingerprint, Keep, OriginalTensor, Remembered, fingerprint, kept, stand_in
from peftcore.injection.quantized_layer import QuantizedLayer, dense_linear, floating_dtype, replace_in_place
from peftcore.layers.computed_tensors import Computation, computation, has_place, parametrized, resting
from peftcore.layers.fsdp import MANAGED, in_pieces
from peftcore.layers.layer import Layer
from peftcore.layers.pieces import ENGINE, is_cut, is_partitioned
from peftcore.registry.plugins import layer_of, registry
from peftcore.surgery.watched_sites import WatchedSites
from peftcore.targets.sites import Site
from peftcore.utils.autocast import full_precision
from peftcore.utils.device_memory import check_room, totals
from peftcore.utils.journal import Journal

if TYPE_CHECKING:
    from peftcore.contract.surgeon_protocol import Graft
    from peftcore.injection.injection import Injection

Into = Literal["float", "same"]
BOUND = 0.25
"""The default for `max_error`: a merge is refused if packing a weight again has a larger error. It is about twice the
error of the coarsest 4-bit format."""


@dataclass(frozen=True)
class MergeOptions:
    """The arguments of a merge."""

    keep: Keep = "cpu"
    into: Into = "float"
    max_error: float = BOUND
    weight: float = 1.0

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("keep", self.keep, ("cpu", "device", "record", None)),
            ("into", self.into, get_args(Into)),
        ):
            if value not in choices:
                raise ConfigError(f"{name}={value!r} is not valid: use one of {', '.join(map(repr, choices))}")
        if not math.isfinite(self.weight):
            raise ConfigError(f"weight={self.weight!r} is not valid: use a finite number")


@dataclass(frozen=True)
class Repacked:
    """The error of packing a merged weight again."""

    error: float
    """Norm of the difference to the merged weight, over the norm of the merged weight."""
    lost: float
    """Norm of the same difference, over the norm of the change that the merge makes. At 1 the error is as large as the
    adapter's effect."""


@dataclass(frozen=True)
class MergeReport:
    """A report of the tensors that a merge wrote."""

    dense: tuple[str, ...] = ()
    """Modules that were quantized and are dense now."""
    repacked: Mapping[str, Repacked] = field(default_factory=dict)
    """Modules that were packed again, with their errors."""
    tensors: int = 0
    """How many tensors were written."""

    def __str__(self) -> str:
        lines = [f"{self.tensors} tensors merged, {len(self.dense)} of them made dense"]
        lines += [f"  {path}: error {r.error:.3g}, of the change {r.lost:.3g}" for path, r in self.repacked.items()]
        return "\n".join(lines)


def _folding(injection: Injection) -> list[Graft]:
    """Returns the grafts (installed operators) that a merge folds into tensors. Operators that act only in training are
    left out."""
    return [graft for graft in injection.grafts if not graft.operator.trains_only]


def _effects(injection: Injection) -> dict[Key, list[Effect]]:
    """Returns the effects of the injection on each tensor, in order."""
    mounts: dict[str, list[Mount]] = {}
    for graft in _folding(injection):
        for site in graft.holders:
            mount = Mount(injection.name, graft.operator, "weight", site.tensor, site.layer, site.slices)
            mounts.setdefault(site.module_path, []).append(mount)
    return {
        (path, tensor): each for path, own in mounts.items() for tensor, each in effects_of(own, runs=False).items()
    }


def _precise(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.dtype == torch.float64 else tensor.float()


def _folded(module: nn.Module, effects: list[Effect], base: Tensor | None) -> Tensor | None:
    """Returns the new stored tensor, computed in float32 or better and rounded once."""
    like = effects[0].mount.layer.like(module, effects[0].mount.tensor) if base is None else base
    precise = _precise(like)  # one copy of the base, not two
    with full_precision(like):
        new = fold(module, effects, None if base is None else precise, precise, _precise)
    return None if new is None else new.to(like.dtype)


@torch.no_grad()
def merged_tensors(injection: Injection) -> Mapping[Key, Tensor]:
    """Returns the tensors that a merge writes: every site's effective tensors, by (module path, tensor path)."""
    new: dict[Key, Tensor] = {}
    for (path, tensor), effects in _effects(injection).items():
        module = injection.module_at(path)
        folded = _folded(module, effects, effects[0].mount.layer.read(module, tensor))
        if folded is not None:
            new[path, tensor] = folded
    return new


@dataclass(frozen=True, eq=False)
class MergeInForce:
    """A merge that is in force, with the records to undo it."""

    wanted: MergeOptions
    report: MergeReport
    written: list[MergeWrite]
    """The changes that were made, in their order; empty with ``keep=None``."""
    frozen: list[Remembered]
    """Parameters that the merge removed from the host, and that were frozen when the host was adapted."""


def _check(injection: Injection) -> None:
    """Verify the conditions of a merge that can be checked without computing the merged tensors."""
    name, state = injection.name, injection.state
    stuck = [graft.site.path for graft in _folding(injection) if not is_mergeable(graft.operator)]
    if stuck:
        raise NotMergeable(
            f"{injection.method.name} cannot be merged into weights: its effect is not a function of the weight alone "
            f"(first at {stuck[0]}). Keep it active, or remove() it"
        )
    check_choices(injection)
    for other in state.injections.values():
        if other.reads_from_base:
            check_unread(other, name, places(injection))
    try:
        (state.watched or WatchedSites()).check(injection.model, state, [name])
    except InactiveSite as error:
        raise MergeError(str(error)) from None
    for graft in _folding(injection):
        for site in graft.holders:
            if fault := injection.fault(site, graft):
                raise MergeError(
                    f"{name!r} does not act at all of its sites, so merging it would change outputs: {fault}. Call "
                    "remove(), then apply or load it again"
                )
            try:
                _check_values(site, graft.operator)
            except UnsupportedSite as error:
                raise MergeError(f"{site.path} cannot be merged, keep {name!r} active: {error}") from None


def check_choices(injection: Injection) -> None:
    """Verify that forwards in all threads and tasks still compute the right result once the injection is merged.

    Raises:
        MergeError: in some thread or task the injection is not active, or a route or composition is in force.
    """
    state = injection.state
    for where, choice in state.choices.in_force():
        check_merge(state.injections, state.merged, injection.name, choice, where)


def _check_values(site: Site, operator: nn.Module) -> None:
    """Verify that the values of a site can be read, and that an operator can be folded into them."""
    site.layer.check_readable(site.module, site.tensor)
    like = site.layer.like(site.module, site.tensor)
    if like.is_meta:
        raise UnsupportedSite("its values are offloaded, or on the meta device")
    if is_partitioned(like):
        raise UnsupportedSite(f"{ENGINE}; save the adapter, and merge it into a model outside of DeepSpeed")
    if is_cut(like) and not all(map(is_cut, operator.parameters())):
        raise UnsupportedSite(
            "it is sharded, but the adapter was applied later and is not; save the adapter, and merge it into the "
            "model before sharding"
        )


def merge_bytes(injection: Injection) -> Mapping[torch.device, int]:
    """Returns how many bytes the new tensors of a merge need, by device. All new tensors exist at the same time, before
    the first one is written.

    The bytes are computed from shapes, so the host may be on the meta device. Not counted are sharded tensors, tensors
    that a module computes, and the temporary memory in which each new tensor is computed.
    """
    sizes: dict[object, tuple[torch.device, int]] = {}
    for key, effects in _effects(injection).items():
        layer, module = effects[0].mount.layer, injection.module_at(key[0])
        if any(map(is_cut, module.parameters(recurse=False))):
            continue
        if layer.packed:
            like = layer.like(module, key[1])
            sizes[key] = like.device, layer.shape(module, key[1]).numel() * like.element_size()
        elif (old := held(*_owner(injection, key))) is not None and not is_cut(old):
            sizes[id(old)] = old.device, old.nbytes
    return totals(sizes.values())


def _check_places(injection: Injection, layers: Mapping[Key, Layer]) -> None:
    """Verify that each old tensor can be replaced by a new one."""
    for key, layer in layers.items():
        if layer.packed:
            continue  # the whole module is exchanged
        owner, name = _owner(injection, key)
        path, way = ".".join(key).strip("."), computation(owner, name)
        old = held(owner, name) if way is None else None
        if not has_place(owner, name):
            raise MergeError(
                f"{path} is computed by {type(owner).__name__} in a custom way, so there is no parameter for the "
                f"merged values. Keep {injection.name!r} active, or replace the module by one that stores its weight"
            )
        sources = way.sources if way is not None else () if old is None else (old,)
        if any(each.requires_grad for each in sources):
            raise MergeError(
                f"{path} of the base trains, or a tensor from which it is computed trains: an optimizer would keep the "
                "old tensors. Call requires_grad_(False) first, and make an optimizer for the new tensors after the "
                "merge"
            )
        if way is not None and MANAGED in vars(owner):
            raise MergeError(
                f"{path} is computed from other tensors and sharded (FSDP2): replace it by a plain parameter before "
                "sharding"
            )


def _owner(injection: Injection, key: Key) -> tuple[nn.Module, str]:
    below, _, name = key[1].rpartition(".")
    return injection.module_at(key[0]).get_submodule(below), name


def _check_ties(injection: Injection, new: Mapping[Key, Tensor], holders: Holders) -> None:
    """Verify for each tied tensor that the merge changes it in no module, or to the same value in all modules that hold
    it."""
    written = {(id(module), name): key for key in new for module, name in [_owner(injection, key)]}
    for tied in holders.values():
        keys = [written.get((id(module), name)) for _, module, name in tied]
        first = next((key for key in keys if key is not None), None)
        if first is None or all(key == first or (key and torch.equal(new[key], new[first])) for key in keys):
            continue
        other = next(
            f"{path}.{name}" for (path, _, name), key in zip(tied, keys, strict=True) if key is None or key != first
        )
        raise MergeError(
            f"{'.'.join(first)} is tied to {other}, and merging would change both. Untie them first: give one an "
            "nn.Parameter of its own"
        )


def _towards(injection: Injection, key: Key, goal: Tensor, weight: float) -> Tensor:
    """Returns the interpolation between the base tensor (`weight` 0) and the effective tensor `goal` (`weight` 1). If
    the host has no such tensor, the base tensor counts as zeros."""
    module = injection.module_at(key[0])
    base = layer_of(module, key[1]).read(module, key[1])
    start = torch.zeros_like(goal) if base is None else base
    return torch.lerp(_precise(start), _precise(goal), weight).to(goal.dtype)


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite. The sum of the values is tested first, since that needs no tensor of booleans.
    Only if the sum is not finite, the values themselves are tested."""
    return bool(torch.isfinite(_precise(tensor).sum())) or bool(torch.isfinite(tensor).all())


def _prediction(injection: Injection, key: Key, merged: Tensor) -> Tensor:
    """Returns the merged tensor minus the delta, which approximates the original. The result has the same bits at merge
    and at unmerge."""
    merged = merged.detach().contiguous()  # sums over other strides round otherwise
    module = injection.module_at(key[0])
    delta = _folded(module, _effects(injection)[key], torch.zeros_like(_precise(merged)))
    assert delta is not None
    return (_precise(merged) - _precise(delta)).to(merged.dtype)


def _at_rest(injection: Injection) -> AbstractContextManager[None]:
    """Context manager in which computed weights (such as a spectral norm) can be read without changing their state."""
    sites = (site for graft in injection.grafts for site in graft.holders)
    owners = (site.module.get_submodule(site.tensor.rpartition(".")[0]) for site in sites if site.tensor)
    return resting(each for owner in owners for each in parametrized(owner).values())


@torch.no_grad()
def merge(injection: Injection, journal: Journal, wanted: MergeOptions) -> MergeInForce:
    """Write the effective tensors into the host. If the option `weight` is not 1, write the base plus that fraction of
    the change.

    Raises:
        NotMergeable: the method has no merged form.
        MemoryLimit: the merged tensors certainly do not fit into the memory of a device.
        MergeError: the injection is not active in every thread and task, an effective tensor is not finite, a tied
            tensor would change in another module, an earlier injection has to be merged first, a tensor cannot be
            replaced, or a weight cannot be packed again with an error of at most `max_error`.
    """
    with _at_rest(injection):
        return _merge(injection, journal, wanted)


def _merge(injection: Injection, journal: Journal, wanted: MergeOptions) -> MergeInForce:
    model = injection.model
    in_pieces(model)
    _check(injection)
    check_room(
        merge_bytes(injection),
        f"merging {injection.name!r}",
        "Merge on the CPU (move the model there first, or use `peftcore merge`), or keep the adapter active",
    )
    new = registry().hook.peftcore_merge(
        model=model, method=injection.method, config=injection.config, injection=injection
    )
    new = dict(new)
    if wanted.weight != 1.0:
        for key in new:
            new[key] = _towards(injection, key, new[key], wanted.weight)
    layers = {key: layer_of(injection.module_at(key[0]), key[1]) for key in new}
    bad: list[str] = []
    prints: dict[Key, Fingerprint] = {}
    for key, tensor in new.items():
        if not _is_finite(tensor):
            bad.append(".".join(key))
        elif not (layers[key].packed or is_cut(tensor)):
            prints[key] = fingerprint(tensor)  # now, while it is in the processor's cache
    if bad:
        raise MergeError(f"the merged weights would not be finite: {', '.join(bad[:4])}; nothing was changed")
    _check_places(injection, layers)
    holders = holders_of(model)
    _check_ties(injection, new, holders)
    writer = _Writer(injection, journal, wanted, holders, prints)
    for key, layer in layers.items():
        writer.write(key, layer, new.pop(key))  # a quantized layer gets a copy
    dense = [each.key[0] for each in writer.written if isinstance(each, QuantizedLayerWrite)]
    report = MergeReport(tuple(path for path in dense if path not in writer.repacked), writer.repacked, len(layers))
    frozen = _exchange(injection, journal, [(each.outgoing(), each.incoming()) for each in writer.written])
    return MergeInForce(
        wanted, report, [] if wanted.keep is None else writer.written, [Remembered(each) for each in frozen]
    )


def let_go(journal: Journal, merged: MergeInForce) -> None:
    """Unfreeze the parameters that the merge removed from the host, if other code still holds them. The host does not
    read them any more."""
    thaw(journal, (each for remembered in merged.frozen if isinstance(each := remembered(), nn.Parameter)))


@torch.no_grad()
def unmerge(injection: Injection, journal: Journal, merged: MergeInForce) -> None:
    """Restore the originals, bit for bit.

    Raises:
        MergeError: the originals were not kept, an injection that was merged later changed the same weights, other code
            has written to the merged tensors, or a record does not reproduce its original.
    """
    name, state = injection.name, injection.state
    if merged.wanted.keep is None:
        raise MergeError(f"{name!r} was merged with keep=None, so the originals are gone; load the base model again")
    for other in state.merged[state.merged.index(name) + 1 :]:
        if places(state.injections[other]) & places(injection):
            raise MergeError(f"unmerge {other!r} first: it was merged on top of {name!r}")
    with _at_rest(injection):
        _unmerge(injection, journal, merged)


def _unmerge(injection: Injection, journal: Journal, merged: MergeInForce) -> None:
    in_pieces(injection.model)
    there = modules_of(injection.model)
    changed = [path for each in merged.written for path in each.changed(there)]
    if changed:
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise MergeError(
            f"{', '.join(changed[:4])}{more}: changed after {injection.name!r} was merged (loaded, trained, cast or "
            "replaced), and unmerging would lose these changes; nothing was changed. Call bake() to keep the current "
            "values"
        )
    holders, predict = holders_of(injection.model), functools.partial(_prediction, injection)
    _exchange(injection, journal, [(w.incoming(), w.undo(journal, holders, predict)) for w in reversed(merged.written)])


def _exchange(
    injection: Injection, journal: Journal, pairs: Iterable[tuple[Iterable[Tensor], Iterable[Tensor]]]
) -> list[Tensor]:
    """Update the list of parameters that are unfrozen when the last injection is removed. If a replaced tensor is in
    the list, its replacements are listed instead. Returns the tensors that were taken from the list."""
    state = injection.state
    frozen = {id(each) for each in state.frozen}
    out: list[Tensor] = []
    into: list[Any] = []
    for old, new in pairs:
        if any(id(each) in frozen for each in old):
            out += old
            into += new
    gone = {id(each) for each in out}
    journal.set(state, "frozen", [*(each for each in state.frozen if id(each) not in gone), *into])
    return out


class _Writer:
    """Writes new tensors into a host, and records how to undo each write."""

    def __init__(
        self,
        injection: Injection,
        journal: Journal,
        wanted: MergeOptions,
        holders: Holders,
        prints: dict[Key, Fingerprint],
    ) -> None:
        self.injection, self.journal, self.wanted = injection, journal, wanted
        self.holders, self.prints = holders, prints
        self.written: list[MergeWrite] = []
        self.repacked: dict[str, Repacked] = {}
        self.places: set[tuple[int, str]] = set()
        self.folded: dict[int, Folded] = {}
        tensors = (each for _, part in injection.modules() for each in (*part.parameters(), *part.buffers()))
        self.memory = {_memory(each) for each in tensors if not is_cut(each)}

    def write(self, key: Key, layer: Layer, tensor: Tensor) -> None:
        """Write one tensor."""
        owner, name = _owner(self.injection, key)
        if isinstance(layer, QuantizedLayer):
            return self._pack(key, owner, layer, tensor)
        if (id(owner), name) in self.places:
            return None  # tied to one that is written
        way = computation(owner, name)
        if way is not None:
            return self._write_computed(key, owner, name, way, tensor)
        old = held(owner, name)
        if old is not None and (is_cut(old) or type(old).__torch_dispatch__ is not Tensor.__torch_dispatch__):
            keep = self.wanted.keep
            values = old.detach().clone() if keep in (None, "device") else old.detach().to("cpu", copy=True)
            overwritten = Overwritten(key, old, values)
            overwritten.put(self.journal, tensor)
            self.written.append(overwritten)
            return None
        holders = self.holders.get(id(old)) or [(owner_path(key), owner, name)]
        if (folded := self.folded.get(id(owner))) is not None:
            folded.fingerprints.pop(name, None)
        self.places |= {(id(module), name) for _, module, name in holders}
        if old is not None and tensor.dtype is not old.dtype:  # of a plugin that answers peftcore_merge
            tensor = tensor.to(old.dtype)
            self.prints[key] = fingerprint(tensor)
        tensor = self._owned(tensor, old)
        if old is None:
            parameter = nn.Parameter(tensor, requires_grad=False)
            self._replace(Replaced(key, holders, parameter, None, self.prints[key]))
        else:
            original = kept(old, self.wanted.keep, lambda: _prediction(self.injection, key, tensor))
            self._replace(Replaced(key, holders, stand_in(old, tensor), original, self.prints[key]))
        return None

    def _replace(self, tensor: Replaced) -> None:
        tensor.put(self.journal)
        self.written.append(tensor)

    def _write_computed(self, key: Key, owner: nn.Module, name: str, way: Computation, tensor: Tensor) -> None:
        self.places.add((id(owner), name))
        found = None if way.hook is not None else inverted(parametrized(owner)[name], tensor)
        if found is None:
            parameter = nn.Parameter(self._owned(tensor, None), requires_grad=False)
            part = self.journal.part()
            tensors = fold_away(part, owner, name, parameter)
            self.folded[id(owner)] = Folded(key, owner, tensors, way.sources, part)
            self.written.append(self.folded[id(owner)])
            return
        path = f"{owner_path(key)}.parametrizations.{name}".lstrip(".")
        for source, value in found.items():
            holder = path, parametrized(owner)[name], source
            old = held(*holder[1:])
            assert old is not None
            new = stand_in(old, self._owned(value, old))
            self._replace(Replaced(key, [holder], new, OriginalTensor(old), fingerprint(new)))

    def _pack(self, key: Key, module: nn.Module, layer: QuantizedLayer, weight: Tensor) -> None:
        """Write a weight into a quantized layer. The layer becomes a dense linear layer, or the weight is packed in the
        layer's format."""
        if self.wanted.into == "float":
            dtype = layer.dtype(module) or floating_dtype(self.injection.base_modules())
            self._reform(key, module, dense_linear(weight, dtype))
            return
        before, again = layer.unpack(module), layer.pack(module, weight)
        off = _precise(layer.unpack(again)) - _precise(weight)
        size, change = _precise(weight).norm(), (_precise(weight) - _precise(before)).norm()
        error = Repacked(float(off.norm() / size.clamp_min(1e-30)), float(off.norm() / change.clamp_min(1e-30)))
        if error.error > self.wanted.max_error:
            raise MergeError(
                f"{key[0]}: packing the merged weight again would change it by {error.error:.3g} of its norm, more "
                f"than {self.wanted.max_error:.3g}; nothing was changed. Merge with into='float', or raise max_error"
            )
        self.repacked[key[0]] = error
        self._reform(key, module, again)

    def _reform(self, key: Key, module: nn.Module, other: nn.Module) -> None:
        part = self.journal.part()
        replace_in_place(part, module, other.train(module.training))
        self.written.append(QuantizedLayerWrite(key, module, part))

    def _owned(self, tensor: Tensor, old: Tensor | None) -> Tensor:
        """Returns the tensor, or a copy if its memory is shared. Some effective tensors share memory with a parameter
        of the adapter, with the old tensor, or with a larger tensor."""
        if old is not None:
            self.memory.add(_memory(old))
        if _memory(tensor) in self.memory or tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        self.memory.add(_memory(tensor))
        return tensor


def _memory(tensor: Tensor) -> int:
    """Returns the address of the memory in which a tensor lies."""
    return tensor.untyped_storage().data_ptr()
