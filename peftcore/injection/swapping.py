"""Hot swap: copies another adapter's values into the installed tensors. The tensors stay the same objects with the same
shapes, so plans and compiled graphs stay valid."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.contract.installed_methods import AppliedMethod
from peftcore.contract.operators import Checked, Shared, _Base
from peftcore.contract.surgeon_protocol import Surgeon
from peftcore.errors import SwapError
from peftcore.forward.context.taps import Tap
from peftcore.forward.state.host_state import HostState
from peftcore.forward.tensors.view import TORCHS
from peftcore.layers.layer import Layer
from peftcore.targets.sites import Site
from peftcore.utils.journal import Journal

LOAD = "load it under another name, peftcore.load(model, path, name=..., active=False)"
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.Size, type, FunctionType)
SIZES = frozenset({"in_features", "out_features"})
"""Attributes of torch's linear layer that its forward does not read."""


@dataclass
class Swap:
    """The writes of a swap: tensors with their new values, and the new options."""

    pairs: list[tuple[Tensor, Tensor]]
    """The adapter's tensors, each with its new values of the same shape."""
    options: Surgeon | None = None
    """The recording of the other adapter, whose options replace the present ones. None if values were padded or scaled,
    since the present options stay then."""


def matched(mine: AppliedMethod, other: AppliedMethod) -> Swap:
    """Returns the writes that make the adapter `mine` compute the same as the adapter `other`.

    Raises:
        SwapError: no writes can do this exactly.
    """
    if type(mine.method) is not type(other.method):
        raise SwapError(
            f"{mine.name!r} is an adapter of {mine.method.name}, but the other adapter is one of {other.method.name}: "
            f"{LOAD}"
        )
    _check_places(mine, other)
    theirs = dict(other.modules())
    work = _Work(mine, other)
    for path, module in mine.modules():
        work.module(path, module, theirs[path])
    if work.wrong:
        raise SwapError(
            f"the values of the other adapter cannot replace those of {mine.name!r} exactly: "
            f"{'; '.join(work.wrong[:8])}. Where a rank is too large, reserve room with peftcore.load(model, path, "
            f"room={{'rank': 64}}); otherwise {LOAD}"
        )
    return Swap(work.pairs, None if work.adjusted else other._surgeon)


def matched_state(mine: AppliedMethod, state: Mapping[str, Tensor]) -> Swap:
    """Returns the writes for the values of a state dict. A state dict has no options, so the adapter keeps its own.

    Raises:
        SwapError: the names, shapes or dtypes of the tensors differ from the adapter's.
    """
    held = {f"{path}.{key}": each for path, module in mine.modules()
            for key, each in nn.Module.state_dict(module, keep_vars=True).items()}  # fmt: skip
    wrong = [f"missing {name}" for name in sorted(held.keys() - state.keys())]
    wrong += [f"unknown {name}" for name in sorted(state.keys() - held.keys())]
    for name in sorted(held.keys() & state.keys()):
        tensor, value = held[name], state[name]
        if tensor.shape != value.shape:
            wrong.append(
                f"{name} has shape {tuple(value.shape)}, expected {tuple(tensor.shape)} (for another rank, pass the "
                "file, which also stores the scale)"
            )
        elif tensor.dtype != value.dtype:
            wrong.append(f"{name} has dtype {value.dtype}, expected {tensor.dtype}")
    for path, module in mine.modules():
        for below, each in module.named_modules(prefix=path):
            if isinstance(each, Checked) and not wrong:
                names = (*each._parameters, *each._buffers)
                values = {name: state[f"{below}.{name}"] for name in names if f"{below}.{name}" in state}
                wrong += [f"{below}.{what}" for what in each.wrong_values(values)]
    if wrong:
        raise SwapError(f"these tensors do not fit {mine.name!r}: {'; '.join(wrong[:8])}")
    return Swap([(held[name], state[name]) for name in held])


def _check_places(mine: AppliedMethod, other: AppliedMethod) -> None:
    def places(applied: AppliedMethod) -> set[tuple[Any, ...]]:
        found: set[tuple[Any, ...]] = {
            (graft.key, type(graft.operator), *((site.path, site.form) for site in graft.holders))
            for graft in applied.grafts
        }
        return found | {(f"shared:{name}", type(module)) for name, module in applied.shared.items()}

    here, there = places(mine), places(other)
    lacking, more = sorted({str(each[0]) for each in here - there}), sorted({str(each[0]) for each in there - here})
    if lacking or more:
        what = [f"it lacks the operators at {', '.join(lacking[:4])}"] if lacking else []
        what += [f"it has other operators at {', '.join(more[:4])}"] if more else []
        raise SwapError(f"the other adapter has other operators than {mine.name!r}: {' and '.join(what)}. {LOAD}")


class _Work:
    """Compares the modules of two adapters. Collects the writes of a swap, and the differences that make it
    impossible."""

    def __init__(self, mine: AppliedMethod, other: AppliedMethod) -> None:
        self.mine, self.other = mine, other
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.wrong: list[str] = []
        self.adjusted = False
        """Whether the swap keeps the present options, because values are padded or scaled or attributes differ. Then
        buffers that are computed from options and not saved in files must be equal in both adapters."""
        self._seen: set[int] = set()
        self._drawn: list[tuple[str, Tensor, Tensor]] = []

    def module(self, path: str, mine: nn.Module, other: nn.Module) -> None:
        """Match the tensors and attributes of one operator or shared module."""
        padded = mine.padded if isinstance(mine, _Base) else frozenset()
        scaled = mine.scaled if isinstance(mine, _Base) else frozenset()
        factors: dict[str, float] = {}
        theirs = dict(other.named_modules())
        inner = dict(mine.named_modules())
        if {name: type(each) for name, each in inner.items()} != {name: type(each) for name, each in theirs.items()}:
            self.wrong.append(f"{path} contains other modules")
            return
        for below, each in inner.items():
            for name, a, b in self._differing(each, theirs[below]):
                full = f"{below}.{name}".lstrip(".")
                if full == "scale" and scaled and isinstance(a, float) and isinstance(b, float) and a:
                    factors |= dict.fromkeys(scaled, b / a)
                elif not _in_training_only(each, name):
                    self.wrong.append(f"{path}: {full} is {_said(b)} in the other adapter, and {_said(a)} here")
                self.adjusted = True
        for below, each in inner.items():
            self._tensors(path, f"{below}.".lstrip("."), each, theirs[below], padded, factors)
        if self.adjusted:
            for name, a, b in self._drawn:
                if not torch.equal(a, b.to(a.device)):
                    self.wrong.append(f"{name} was computed with other options, and is not saved in files")
            self._drawn.clear()

    def _tensors(
        self,
        path: str,
        prefix: str,
        mine: nn.Module,
        other: nn.Module,
        padded: frozenset[str],
        factors: Mapping[str, float],
    ) -> None:
        for a_table, b_table in ((mine._parameters, other._parameters), (mine._buffers, other._buffers)):
            for name, a in a_table.items():
                b, full = b_table.get(name), prefix + name
                if (a is None) != (b is None):
                    self.wrong.append(f"{path}.{full} exists in only one of the adapters")
                if a is None or b is None or id(a) in self._seen:
                    continue
                self._seen.add(id(a))
                if name in mine._non_persistent_buffers_set and a.shape == b.shape:
                    self._drawn.append((f"{path}.{full}", a, b))
                self._pair(f"{path}.{full}", a, b.detach(), full in padded, factors.get(full, 1.0))

    def _pair(self, name: str, mine: Tensor, value: Tensor, padded: bool, factor: float) -> None:
        if type(mine) not in (Tensor, nn.Parameter):
            self.wrong.append(f"{name} is a {type(mine).__name__}, which values cannot be copied into")
        elif mine.dtype != value.dtype:
            self.wrong.append(f"{name} has dtype {value.dtype}, expected {mine.dtype}")
        elif mine.is_meta or value.is_meta:
            self.wrong.append(f"{name} has no values: the model is on the meta device")
        elif mine.shape != value.shape and not (padded and _fits(value.shape, mine.shape)):
            what = f"room for {tuple(mine.shape)}" if padded else f"expected {tuple(mine.shape)}"
            self.wrong.append(f"{name} has shape {tuple(value.shape)}, {what}")
        else:
            if factor != 1.0:
                value = value * factor
            if mine.shape != value.shape:
                whole = value.new_zeros(mine.shape)
                whole[tuple(slice(size) for size in value.shape)] = value
                value, self.adjusted = whole, True
            self.pairs.append((mine, value))

    def _differing(self, mine: nn.Module, other: nn.Module) -> Iterator[tuple[str, Any, Any]]:
        a_all, b_all = vars(mine), vars(other)
        for name in sorted((a_all.keys() | b_all.keys()) - TORCHS):
            if (name in SIZES and type(mine) is nn.Linear) or (isinstance(mine, _Base) and name in mine.known_by):
                continue
            a, b = a_all.get(name), b_all.get(name)
            if not self._same(a, b):
                yield name, a, b

    def _same(self, a: Any, b: Any) -> bool:
        """Whether an attribute means the same in an operator of one adapter and the corresponding operator of the
        other."""
        if type(a) is not type(b):
            return False
        if a is b or isinstance(a, Layer | Site | Shared | Tap):  # shared modules are compared by themselves
            return True
        if isinstance(a, PLAIN):
            return bool(a == b)
        if isinstance(a, Tensor):
            return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b.to(a.device))
        if isinstance(a, tuple | list):
            return len(a) == len(b) and all(map(self._same, a, b))
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(self._same(a[key], b[key]) for key in a)
        if isinstance(a, set | frozenset):
            return bool(a == b)
        if dataclasses.is_dataclass(a):
            names = [each.name for each in dataclasses.fields(a) if each.compare]
            return all(self._same(getattr(a, name), getattr(b, name)) for name in names)
        return bool(self.mine.config == self.other.config)  # whatever it is, it was made of the same


def _in_training_only(module: nn.Module, name: str) -> bool:
    """Whether an attribute has no effect on what is computed in evaluation mode."""
    if isinstance(module, _Base):
        return name in module.training_only
    return isinstance(module, nn.modules.dropout._DropoutNd)


def _fits(inner: torch.Size, outer: torch.Size) -> bool:
    return len(inner) == len(outer) and all(a <= b for a, b in zip(inner, outer, strict=True))


def _said(value: Any) -> str:
    return repr(value) if isinstance(value, PLAIN) else f"another {type(value).__name__}"


@contextmanager
def exchanging(state: HostState, name: str) -> Iterator[None]:
    """Context manager in which the values of an injection may be written. No forward that uses the injection runs
    inside the block, since a forward that begins meanwhile waits.

    Raises:
        SwapError: a forward that uses the injection is running, or a call of `using` that names it has not ended.
    """
    with state.exchanging(name) as forwards:
        if any(name in choice.named for choice in (*forwards, *state.choices.called())):
            raise SwapError(
                f"{name!r} is in use: a forward or a call of peftcore.using that names it has not ended, and would "
                f"compute with old and new values. Swap between calls; if calls always overlap, {LOAD}, and use that "
                "name in new calls"
            )
        yield


def write(mine: AppliedMethod, swap: Swap) -> None:
    """Write the values and the options. After an error, the previous values are restored."""
    inference = any(tensor.is_inference() for tensor, _ in swap.pairs)
    copies = [(tensor, value.to(tensor.device)) for tensor, value in swap.pairs]  # what can fail comes first
    with torch.inference_mode(inference), torch.no_grad(), Journal() as journal:
        for tensor, value in copies:
            journal.write(tensor, value)
        if swap.options is not None:
            _take_options(journal, mine._surgeon, swap.options)
            journal.set(mine, "config", mine._surgeon.config)


def _take_options(journal: Journal, mine: Surgeon, other: Surgeon) -> None:
    journal.set(mine, "config", other.config)
    for name, part in mine.parts.items():
        _take_options(journal, part, other.parts[name])
