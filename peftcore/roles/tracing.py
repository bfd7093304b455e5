"""Refines a host map by one forward with autograd: operands and slices of attentions, gates, norms, heads, and modules
that are not called.

The probe uses gradients, not tables of names. Rows of a fused matrix belong to the query if the query's gradient
reaches them. Rows are the up part of a gated MLP if the product is linear in them. If a parameter receives a gradient
although its module never ran, the parameter is read without a call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.roles.entries import HostEntry, Layout, Slices
from peftcore.roles.hostmap import HostMap, under
from peftcore.roles.recording import AttentionEvent, DownEvent, Inputs, Recording, differentiable, record
from peftcore.roles.vocabulary import OTHER

_OPERANDS = ("q", "k", "v")
_PARTS = frozenset({"q", "k", "v", "kv", "qkv"})
_MATRIX_KINDS = frozenset({"linear", "conv"})
_UPS = frozenset({"mlp.gate", "mlp.up", "mlp.gate_up"})
# Relative error up to which a contraction counts as equal. A gate at the usual initial scale is off by 1e-2.
_LINEAR = 1e-4
_LINEAR_HALF = 3e-3  # float16, bfloat16


def probe(model: nn.Module, inputs: Inputs, host: HostMap) -> HostMap:
    """Run the model once on example inputs, and return the map with the corrections that this forward shows.

    The model does not change: modes, `requires_grad` and gradients are as before. Entries for which the forward gives
    no information stay as they are.
    """
    matrices = frozenset(entry.path for entry in host.entries if entry.kind in _MATRIX_KINDS and entry.tensor is None)
    downs = frozenset(entry.path for entry in host.entries if entry.role == "mlp.down")
    with differentiable(model):
        recording = record(model, inputs, matrices, downs)
        changes = Changes(host)
        for event in recording.attentions:
            _Attention(model, changes, event).refine()
        for down in recording.downs:
            refine_gates(changes, down)
        refine_norms(changes, recording)
        refine_head(changes, recording)
        refine_calls(model, changes, recording)
    return changes.result()


class Changes:
    """The entries of a map while they are being corrected, by path."""

    def __init__(self, host: HostMap) -> None:
        self.host = host
        self.entries = list(host.entries)
        self._places: dict[str, list[int]] = {}
        for place, entry in enumerate(self.entries):
            self._places.setdefault(entry.path, []).append(place)

    def at(self, path: str) -> HostEntry | None:
        """Returns the entry of a path. A block that is also an attention has two entries; the attention's entry is
        returned."""
        places = self._places.get(path)
        return self.entries[places[-1]] if places else None

    def known(self, path: str) -> HostEntry:
        entry = self.at(path)
        assert entry is not None, f"{path} ran, so it is in the map"
        return entry

    def set(self, path: str, **fields: Any) -> None:
        place = self._places[path][-1]
        self.entries[place] = replace(self.entries[place], **fields)

    def result(self) -> HostMap:
        return HostMap(tuple(self.entries))


@dataclass
class _Attention:
    """Finds the matrices that compute each operand of one recorded attention, and writes them into the map."""

    model: nn.Module
    changes: Changes
    event: AttentionEvent

    def refine(self) -> None:
        scope, family, since = self._scope()
        called = {
            path: output.value
            for path, output in self.event.outputs.items()
            if output.time > since and under(path, scope) and output.value.requires_grad
        }
        read = self._read_matrices(scope, called)
        rows = self._rows(called, read)
        own = {path for path in rows if (entry := self.changes.at(path)) and entry.role.startswith(f"{family}.")}
        fed = {name for path in own for name in rows[path]}
        for path in own | self._last_feeders(rows, set(_OPERANDS) - fed):
            self._write(path, family, rows[path])

    def _scope(self) -> tuple[str, str, int]:
        """Returns path, role and start time of the module that computes this attention: the innermost running module
        with the role of an attention, or if there is none, the innermost running module."""
        for frame in reversed(self.event.frames):
            entry = self.changes.at(frame.path)
            if entry is not None and entry.role in ("attn", "cross"):
                return frame.path, entry.role, frame.time
        last = self.event.frames[-1]
        return last.path, "attn", last.time

    def _read_matrices(self, scope: str, called: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
        """Returns the parameters of attention matrices in the scope that were not called."""
        found = {}
        for entry in self.changes.entries:
            operand = entry.role.partition(".")[2] in _PARTS
            if operand and entry.path not in called and entry.kind != "experts" and under(entry.path, scope):
                parameter = own_parameter(self.model, entry)
                if parameter is not None and parameter.requires_grad:
                    found[entry.path] = parameter
        return found

    def _rows(
        self, called: Mapping[str, Tensor], read: Mapping[str, nn.Parameter]
    ) -> dict[str, dict[str, tuple[int, ...]]]:
        """Returns, for each matrix and operand, the rows of the matrix that feed the operand."""
        rows: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, operand in self.event.operands.items():
            if operand.requires_grad and (called or read):
                gradients = contract(operand, [*called.values(), *read.values()])
                for path, gradient in zip([*called, *read], gradients, strict=True):
                    entry = self.changes.at(path)
                    if gradient is not None and entry is not None:
                        by_row = output_rows(entry, gradient) if path in called else parameter_rows(entry, gradient)
                        if reached := tuple(by_row.flatten(1).abs().amax(1).nonzero().flatten().tolist()):
                            rows.setdefault(path, {})[name] = reached
        return rows

    def _last_feeders(self, rows: Mapping[str, Mapping[str, Any]], operands: set[str]) -> set[str]:
        """Returns a matrix for each operand that has no known matrix: of all matrices that feed the operand, the one
        that ran last."""
        found = set()
        for name in operands:
            feeding = [path for path, reached in rows.items() if name in reached and path in self.event.outputs]
            if feeding:
                found.add(max(feeding, key=lambda path: self.event.outputs[path].time))
        return found

    def _write(self, path: str, family: str, rows: Mapping[str, tuple[int, ...]]) -> None:
        """Set the role of a matrix by the operands that it feeds.

        The entry does not change if rows feed two operands (the latents of MLA), or if rows feed no operand although
        their role requires one: then the example input was degenerate (DETR's first queries are zero).
        """
        entry = self.changes.at(path)
        reached = [row for part in rows.values() for row in part]
        if entry is None or len(reached) != len(set(reached)):
            return
        part, operands = entry.role.partition(".")[2], "".join(name for name in _OPERANDS if name in rows)
        layout = as_layout(rows) if len(rows) > 1 else None
        if part == "kv_b" or operands == part:
            self.changes.set(path, layout=layout)
        elif operands in _PARTS and (part in _PARTS or entry.role == OTHER) and len(reached) == entry.rows:
            self.changes.set(path, role=f"{family}.{operands}", layout=layout)


def own_parameter(model: nn.Module, entry: HostEntry) -> nn.Parameter | None:
    """Returns the parameter of an entry."""
    owner, _, name = (entry.tensor or "weight").rpartition(".")
    module = model.get_submodule(f"{entry.module}.{owner}".strip("."))
    return module._parameters.get(name)


def output_rows(entry: HostEntry, output: Tensor) -> Tensor:
    """Returns the output of a matrix with its rows (channels) first: convolutions have channels first, other modules
    last."""
    return output.movedim(1 if entry.kind == "conv" else -1, 0)


def parameter_rows(entry: HostEntry, stored: Tensor) -> Tensor:
    """Returns a stored matrix with its rows first: bare q, k, v parameters and GPT-2's Conv1D are stored as (in,
    out...)."""
    straight = tuple(stored.shape[:2]) == entry.shape[:2]
    return stored.flatten(1) if straight else stored.flatten(1).movedim(1, 0)


def contract(value: Tensor, sources: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Returns the gradients of a random projection of `value`. The graph is kept for the next call."""
    gradients = torch.autograd.grad(value, list(sources), random_like(value), retain_graph=True, allow_unused=True)
    return tuple(gradients)


def random_like(value: Tensor) -> Tensor:
    """Returns random numbers without using the global generator."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(value.shape, generator=generator).to(value)


def as_layout(rows: Mapping[str, tuple[int, ...]]) -> Layout:
    """Returns the layout with its parts in the order of their rows."""
    return Layout(tuple((name, as_ranges(rows[name])) for name in sorted(rows, key=lambda name: rows[name][0])))


def as_ranges(rows: Sequence[int]) -> Slices:
    """Returns ranges of rows: [0, 1, 2, 6, 7] -> ((0, 3), (6, 8))."""
    present = set(rows)
    starts = [row for row in rows if row - 1 not in present]
    stops = [row + 1 for row in rows if row + 1 not in present]
    return tuple(zip(starts, stops, strict=True))


def refine_gates(changes: Changes, event: DownEvent) -> None:
    """Find the rows of the up part of gated MLPs. The product of gate and up is linear in the up part, so its
    derivative contracted with the up part equals the product.

    Usually the product is not linear in the gate, so exactly one order of gate and up fits. If it is linear in the gate
    (ReLU), or if there are further operations, several or no orders fit. Then the entries do not change.
    """
    ups = [(path, event.outputs[path].value) for path in matching_ups(changes, event)]
    if not ups or not event.value.requires_grad:
        return
    direction = random_like(event.value)
    values = [y for _, y in ups]
    gradients = torch.autograd.grad(event.value, values, direction, retain_graph=True, allow_unused=True)
    shares = [
        output_rows(changes.known(path), (gradient * y.detach()).double()).flatten(1)
        for (path, y), gradient in zip(ups, gradients, strict=True)
        if gradient is not None
    ]
    expected = output_rows(changes.known(event.path), (direction * event.value.detach()).double()).flatten(1)
    if len(shares) != len(ups) or any(share.shape[1] != expected.shape[1] for share in shares):
        return
    contracted = torch.cat(shares)
    tolerance = _LINEAR if event.value.dtype in (torch.float32, torch.float64) else _LINEAR_HALF
    fitting = [
        order
        for order in gate_orders(len(ups), len(contracted))
        if same_per_token(contracted[list(order.up)], expected, tolerance)
    ]
    if len(fitting) == 1:
        write_gates(changes, [path for path, _ in ups], fitting[0])


def same_per_token(contracted: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether the sums of two tensors over their rows agree for each token, up to a tolerance relative to
    `expected`."""
    difference = (contracted.sum(0) - expected.sum(0)).norm()
    return float(expected.norm()) > 0 and float(difference) <= tolerance * float(expected.norm())


@dataclass(frozen=True)
class GateOrder:
    """One possible order of gate and up in the rows."""

    gate: range
    up: range


def gate_orders(matrices: int, rows: int) -> list[GateOrder]:
    """Returns the possible orders: two halves in either order; in a single matrix also alternating rows."""
    first, second = range(0, rows // 2), range(rows // 2, rows)
    orders = [GateOrder(first, second), GateOrder(second, first)]
    if matrices == 1:
        even, odd = range(0, rows, 2), range(1, rows, 2)
        orders += [GateOrder(even, odd), GateOrder(odd, even)]
    return orders


def matching_ups(changes: Changes, event: DownEvent) -> list[str]:
    """Returns the up and gate matrices of the same branch: the nearest matrices that ran and have a fitting width."""
    scope = event.path
    while scope:
        scope = scope.rpartition(".")[0]
        found = [
            path
            for path in event.outputs
            if under(path, scope) and (entry := changes.at(path)) is not None and entry.role in _UPS
        ]
        entries = [entry for path in found if (entry := changes.at(path)) is not None]
        if entries:
            down = changes.at(event.path)
            assert down is not None
            fused = len(entries) == 1 and entries[0].rows == 2 * down.shape[1]
            paired = len(entries) == 2 and all(entry.rows == down.shape[1] for entry in entries)
            return found if fused or paired else []
    return []


def write_gates(changes: Changes, paths: Sequence[str], order: GateOrder) -> None:
    if len(paths) == 1:
        changes.set(paths[0], layout=as_layout({"gate": tuple(order.gate), "up": tuple(order.up)}))
    else:
        gate_first = order.gate.start == 0
        for path, role in zip(paths, ("mlp.gate", "mlp.up") if gate_first else ("mlp.up", "mlp.gate"), strict=True):
            changes.set(path, role=role)


def refine_norms(changes: Changes, recording: Recording) -> None:
    """Distinguish norms before the blocks from norms after them, by the order of calls. Without a forward, the order of
    registration is used, which may differ."""
    time = recording.first_call
    blocks = [entry.path for entry in changes.entries if entry.role == "block" and entry.path in time]
    for entry in list(changes.entries):
        if entry.role not in ("norm.embed", "norm.final") or entry.path not in time:
            continue
        times = nearest_times(entry.path, blocks, time)
        if times and time[entry.path] < min(times):
            changes.set(entry.path, role="norm.embed")
        elif times and time[entry.path] > max(times):
            changes.set(entry.path, role="norm.final")


def nearest_times(path: str, blocks: Sequence[str], time: Mapping[str, int]) -> list[int]:
    """Returns the times at which blocks ran, for the blocks under the nearest ancestor of `path` that contains
    blocks."""
    while path:
        path = path.rpartition(".")[0]
        times = [time[block] for block in blocks if under(block, path)]
        if times:
            return times
    return []


def refine_head(changes: Changes, recording: Recording) -> None:
    """If no entry has the role of the head, assign it to the last matrix that ran, if it ran after the last block."""
    if any(entry.role == "head" for entry in changes.entries):
        return
    time = recording.first_call
    last_block = max((time.get(entry.path, 0) for entry in changes.entries if entry.role == "block"), default=0)
    outside = [
        entry.path
        for entry in changes.entries
        if entry.kind == "linear"
        and entry.tensor is None
        and entry.block is None
        and time.get(entry.path, 0) > last_block
    ]
    if outside:
        last = max(outside, key=lambda path: time[path])
        entry = changes.at(last)
        if entry is not None and entry.role == OTHER:
            changes.set(last, role="head")


def refine_calls(model: nn.Module, changes: Changes, recording: Recording) -> None:
    """Mark parameters on which the output depends although their module never ran. They are read by the nearest
    enclosing module that ran, or by a module inside that one."""
    silent = [
        (path, parameter)
        for path, module in model.named_modules()
        if path not in recording.first_call
        for parameter in module._parameters.values()
        if parameter is not None and parameter.requires_grad
    ]
    results = [tensor for tensor in tensors_in(recording.result) if tensor.requires_grad]
    if not silent or not results:
        return
    parameters, directions = [parameter for _, parameter in silent], [random_like(result) for result in results]
    gradients = torch.autograd.grad(results, parameters, directions, retain_graph=True, allow_unused=True)
    read = {path for (path, _), gradient in zip(silent, gradients, strict=True) if gradient is not None}
    for entry in list(changes.entries):
        if entry.module in read:
            changes.set(entry.path, called=False, reader=nearest_running(entry.module, recording))


def nearest_running(path: str, recording: Recording) -> str:
    while path and path not in recording.first_call:
        path = path.rpartition(".")[0]
    return path


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yields all floating tensors in a model's output."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value):
        for item in vars(value).values():
            yield from tensors_in(item)
