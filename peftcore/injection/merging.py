"""Merging an injection into the host's tensors, and the exact way back.

Deltas are computed in float32 (float64 for float64 hosts) and cast once. All sites are written or none. The originals
are kept as asked: on the CPU or on their device, or as a record of ulps: how many representable steps the original lies
from the result of subtracting the delta again; for additive methods nearly all zeros, so it compresses to a few
percent.

A quantized weight is made dense by a merge, or packed again with the measured error in the report; its codes are kept
to restore it.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from peftcore.contract.operators import is_mergeable
from peftcore.errors import MergeError, NotMergeable, UnsupportedSite
from peftcore.forward.mount import Effect, Mount, effects_of, fold
from peftcore.forward.save_pretrained import saving_base
from peftcore.injection.quantized_layer import (
    Form,
    QuantizedLayer,
    dense_linear,
    floating_dtype,
    replace_in_place,
    restore,
)
from peftcore.registry.plugins import layer_of, registry
from peftcore.utils.autocast import full_precision

if TYPE_CHECKING:
    from peftcore.injection.injection import Injection

Keep = Literal["cpu", "record", "device"] | None
Into = Literal["float", "same"]
Key = tuple[str, str]
"""(module path, tensor path below it)"""
BOUND = 0.25
"""The error of packing again above which a merge is refused: about twice that of the coarsest 4-bit format."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Original:
    """One tensor before the merge: its values, None for one that did not exist, or a record against a prediction."""

    values: Tensor | None
    record: bytes | None = None
    digest: bytes = b""
    aside: bool = False
    """Whether the values are the tensor itself, which was set aside: on the CPU nothing has to be copied."""
    form: Form | None = None
    """Of a quantized weight: the form of its module, codes included."""


@dataclass(frozen=True)
class Repacked:
    """The error of packing a merged weight again."""

    error: float
    """Norm of the difference to the merged weight, over the norm of the merged weight."""
    lost: float
    """The same difference over the norm of the merge's change: at 1 it drowns the adapter."""


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


def _effects(injection: Injection) -> dict[Key, list[Effect]]:
    """Returns the effects of the injection on each tensor, in order."""
    mounts: dict[str, list[Mount]] = {}
    for graft in injection.grafts:
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
    with full_precision(like):
        new = fold(module, effects, None if base is None else _precise(base), _precise(like), _precise)
    return None if new is None else new.to(like.dtype)


@torch.no_grad()
def merged_tensors(injection: Injection) -> Mapping[Key, Tensor]:
    """Returns the tensors that a merge writes: every site's effective tensors, by (module path, tensor path)."""
    new: dict[Key, Tensor] = {}
    for (path, tensor), effects in _effects(injection).items():
        module = injection.model.get_submodule(path)
        folded = _folded(module, effects, effects[0].mount.layer.read(module, tensor))
        if folded is not None:
            new[path, tensor] = folded
    return new


def _check(injection: Injection) -> None:
    name = injection.name
    stuck = [graft.site.path for graft in injection.grafts if not is_mergeable(graft.operator)]
    if stuck:
        raise NotMergeable(
            f"{injection.method.name} cannot be folded into weights: what it computes is no function of the weight "
            f"alone (first at {stuck[0]}). Keep it active, or remove() it"
        )
    for site in (site for graft in injection.grafts for site in graft.holders):
        try:
            site.layer.check_readable(site.module, site.tensor)
        except UnsupportedSite as error:
            raise MergeError(f"{site.path} cannot be merged, keep {name!r} active: {error}") from None
    state = injection.state
    waiting = set(state.unmerged(state.current()))
    mine = _places(injection)
    for other in takewhile(lambda each: each != name, state.injections):
        if other in waiting and mine & _places(state.injections[other]):
            raise MergeError(f"merge {other!r} first: it came before {name!r} and acts on the same weights")


def _places(injection: Injection) -> set[Key]:
    return {(site.module_path, site.tensor) for graft in injection.grafts for site in graft.holders}


def _owner(model: nn.Module, key: Key) -> tuple[nn.Module, str]:
    below, _, name = key[1].rpartition(".")
    return model.get_submodule(key[0]).get_submodule(below), name


def _check_ties(model: nn.Module, new: Mapping[Key, Tensor]) -> None:
    """Check that a merge changes a tied tensor only where the injection gives all its holders one value."""
    written = {(id(module), name): key for key in new for module, name in [_owner(model, key)]}
    holders: dict[int, list[tuple[str, nn.Module, str]]] = {}
    with saving_base():  # operators are tied to nothing, and there may be many
        modules = list(model.named_modules())
    for path, module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((path, module, name))
    for tied in holders.values():
        keys = [written.get((id(module), name)) for _, module, name in tied]
        first = next((key for key in keys if key is not None), None)
        if first is None or all(key == first or (key and torch.equal(new[key], new[first])) for key in keys):
            continue
        other = next(
            f"{path}.{name}" for (path, _, name), key in zip(tied, keys, strict=True) if key is None or key != first
        )
        raise MergeError(
            f"{'.'.join(first)} is tied to {other}, and merging would change that too. "
            "Untie them first: give one an nn.Parameter of its own"
        )


def _can_be_set_aside(tensor: Tensor) -> bool:
    """Whether a tensor can be set aside without a copy. On other devices graphs may have been captured that read from
    its address; a part of a larger tensor stays there."""
    plain = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_shared()  # type: ignore[no-untyped-call]
    return plain and tensor.device.type == "cpu" and tensor.untyped_storage().nbytes() == tensor.nbytes


def _write(model: nn.Module, key: Key, value: Tensor | None, aside: bool = False) -> None:
    """Set a tensor; None removes a parameter that a merge had added. A tensor set aside keeps its values."""
    module, name = _owner(model, key)
    layer = layer_of(model.get_submodule(key[0]), key[1])
    if aside:
        held = layer.read(module, name)
        assert held is not None and value is not None
        held.data = value.detach().contiguous() if held.is_contiguous() else value.detach()
    elif value is None:
        module._parameters[name] = None
    elif layer.read(module, name) is None:
        module._parameters[name] = nn.Parameter(value.clone(), requires_grad=False)
    else:
        layer.write(model.get_submodule(key[0]), key[1], value)


def _read(model: nn.Module, key: Key) -> Tensor | None:
    module = model.get_submodule(key[0])
    return layer_of(module, key[1]).read(module, key[1])


def _towards(model: nn.Module, key: Key, goal: Tensor, weight: float) -> Tensor:
    """Returns the tensor a part of the way from the base to an effective tensor; a tensor that the host lacks counts as
    zeros."""
    base = _read(model, key)
    start = torch.zeros_like(goal) if base is None else base
    return torch.lerp(_precise(start), _precise(goal), weight).to(goal.dtype)


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite. The sum tells without a tensor of booleans, unless it overflows."""
    return bool(torch.isfinite(_precise(tensor).sum())) or bool(torch.isfinite(tensor).all())


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(_INTEGERS[tensor.element_size()])


def _digest(tensor: Tensor) -> bytes:
    return hashlib.sha256(_bits(tensor).numpy().tobytes()).digest()


def _prediction(injection: Injection, key: Key, merged: Tensor) -> Tensor:
    """Returns the original as subtracting the delta would give it; the same numbers at merge and at unmerge."""
    merged = merged.contiguous()  # sums over other strides round otherwise
    module = injection.model.get_submodule(key[0])
    delta = _folded(module, _effects(injection)[key], torch.zeros_like(_precise(merged)))
    assert delta is not None
    return (_precise(merged) - _precise(delta)).to(merged.dtype)


def _keep(injection: Injection, key: Key, keep: Keep, old: Tensor | None, new: Tensor) -> Original:
    if old is not None and keep in ("cpu", "device") and _can_be_set_aside(old):
        return Original(old.detach(), aside=True)
    if old is None or keep is None or keep == "device":
        return Original(None if old is None else old.detach().clone())
    if keep == "cpu":
        return Original(old.detach().to("cpu", copy=True))
    steps = _bits(old) - _bits(_prediction(injection, key, new))
    return Original(None, zlib.compress(steps.numpy().tobytes(), 6), _digest(old))


def _original(injection: Injection, key: Key, original: Original, merged: Tensor) -> Tensor | None:
    if original.record is None:
        return original.values
    steps = torch.frombuffer(bytearray(zlib.decompress(original.record)), dtype=_INTEGERS[merged.element_size()])
    bits = _bits(_prediction(injection, key, merged))
    old = (bits + steps.view(bits.shape)).view(merged.dtype)
    if _digest(old) != original.digest:
        raise MergeError(
            f"{'.'.join(key)}: the record does not fit any more, since an operator or the merged weight changed after "
            "the merge; reload the base model"
        )
    return old


@torch.no_grad()
def merge(
    injection: Injection, keep: Keep, into: Into = "float", bound: float = BOUND, weight: float = 1.0
) -> tuple[dict[Key, Original], MergeReport]:
    """Write the effective tensors, or (with `weight`) a part of the way to them, all or none; returns the originals and
    a report.

    Raises:
        NotMergeable: the method has no merged form.
        MergeError: an effective tensor is not finite, a tied tensor would change elsewhere, an earlier injection
            must go first, or a weight cannot be packed again or not well enough.
    """
    _check(injection)
    new = registry().hook.peftcore_merge(
        model=injection.model, method=injection.method, config=injection.config, injection=injection
    )
    if weight != 1.0:
        new = {key: _towards(injection.model, key, tensor, weight) for key, tensor in new.items()}
    bad = [".".join(key) for key, tensor in new.items() if not _is_finite(tensor)]
    if bad:
        raise MergeError(f"the merged weights would not be finite: {', '.join(bad[:4])}; nothing was changed")
    _check_ties(injection.model, new)
    originals: dict[Key, Original] = {}
    repacked: dict[str, Repacked] = {}
    done: set[int] = set()
    try:
        for key, tensor in new.items():
            layer = layer_of(injection.model.get_submodule(key[0]), key[1])
            if isinstance(layer, QuantizedLayer):
                originals[key], error = _write_packed(injection, key, layer, tensor, into)
                if error is not None:
                    repacked[key[0]] = _within(error, bound, key[0])
                continue
            old = _read(injection.model, key)
            if id(old) in done:
                continue  # tied to one that is written
            originals[key] = _keep(injection, key, keep, old, tensor)
            _write(injection.model, key, tensor, originals[key].aside)
            done.add(id(_read(injection.model, key)))
    except BaseException:
        _restore(injection, originals)
        raise
    dense = [key[0] for key, original in originals.items() if original.form is not None and key[0] not in repacked]
    return originals, MergeReport(tuple(dense), repacked, len(new))


def _write_packed(
    injection: Injection, key: Key, layer: QuantizedLayer, weight: Tensor, into: Into
) -> tuple[Original, Repacked | None]:
    """Write a weight into a quantized layer: as a dense linear layer, or packed in the same way."""
    module, _ = _owner(injection.model, key)
    if into == "float":
        dense = dense_linear(weight, layer.dtype(module) or floating_dtype(injection.base_modules()))
        return Original(None, form=replace_in_place(module, dense.train(module.training))), None
    before = layer.unpack(module)
    again = layer.pack(module, weight).train(module.training)
    off = _precise(layer.unpack(again)) - _precise(weight)
    size, change = _precise(weight).norm(), (_precise(weight) - _precise(before)).norm()
    error = Repacked(float(off.norm() / size.clamp_min(1e-30)), float(off.norm() / change.clamp_min(1e-30)))
    return Original(None, form=replace_in_place(module, again)), error


def _within(error: Repacked, bound: float, path: str) -> Repacked:
    if error.error > bound:
        raise MergeError(
            f"{path}: packing the merged weight again would change it by {error.error:.3g} of its norm, more than "
            f"{bound:.3g}; nothing was changed. Merge into='float', or raise max_error"
        )
    return error


def _restore(injection: Injection, originals: Mapping[Key, Original]) -> None:
    values = {}
    for key, original in originals.items():
        if original.form is None:
            merged = _read(injection.model, key)
            assert merged is not None
            values[key] = _original(injection, key, original, merged)
    for key, value in values.items():
        _write(injection.model, key, value, originals[key].aside)
    for key, original in originals.items():
        if original.form is not None:
            restore(_owner(injection.model, key)[0], original.form)


@torch.no_grad()
def unmerge(injection: Injection, originals: Mapping[Key, Original]) -> None:
    """Write the originals back, bit for bit.

    Raises:
        MergeError: an injection merged later lies on the same weights, or a record no longer fits.
    """
    later = list(injection.state.injections)
    for other in later[later.index(injection.name) + 1 :]:
        above = injection.state.injections[other]
        if above.merged and set(above.originals or ()) & set(originals):
            raise MergeError(f"unmerge {other!r} first: it was merged on top of {injection.name!r}")
    _restore(injection, originals)
