"""Costs of a method: what it would add to a model, and what a step of training would take."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from peftcore.comparing.models.activations import Batch, Pretended, explained
from peftcore.comparing.models.example_inputs import Size, Unknown
from peftcore.comparing.models.skeletons import Skeleton, skeleton
from peftcore.comparing.plans.recorded import Recorded, Wanted
from peftcore.comparing.quiet import quiet
from peftcore.files.envelope import envelope_of
from peftcore.files.formats.native import METADATA
from peftcore.files.safe_io import DTYPES
from peftcore.forward.host_state import HostState
from peftcore.injection.applying import establish
from peftcore.injection.injection import Injection

NAMES = {dtype: name for name, dtype in DTYPES.items()}
STATES = 2
"""Numbers that AdamW keeps for each that trains."""


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward keeps for its backward, or the reason why they are not known."""

    batch: Batch | None = None
    adapted: int | None = None
    full: int | None = None
    unknown: str | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes that one step of training takes. Tensors that come and go within it (gradients of activations, buffers of
    kernels) are not in it."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int | None

    @classmethod
    def of(cls, weights: int, adapter: int, trained: Iterable[Tensor], activations: int | None) -> Memory:
        gradients = held(trained)
        return cls(weights, adapter, gradients, STATES * gradients, activations)

    @property
    def total(self) -> int | None:
        """Return the sum, where all of it is known."""
        known = self.weights + self.adapter + self.gradients + self.optimizer
        return None if self.activations is None else known + self.activations

    def as_dict(self) -> dict[str, int | None]:
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class Costs:
    """All that ``peftcore plan`` says."""

    skeleton: Skeleton
    recorded: Recorded
    file_size: int
    activations: Activations
    memory: Memory
    full: Memory
    """The same of full fine-tuning."""

    @property
    def notes(self) -> tuple[str, ...]:
        return (*self.skeleton.notes, *self.recorded.notes)

    def as_dict(self) -> dict[str, Any]:
        batch = self.activations.batch
        return {
            **self.skeleton.as_dict(),
            **self.recorded.as_dict(),
            "file_size": self.file_size,
            "batch": None if batch is None else batch.shapes,
            "with_loss": batch is not None and batch.loss,
            "activations_unknown": self.activations.unknown,
            "memory": {"adapted": self.memory.as_dict(), "full": self.full.as_dict()},
            "notes": list(self.notes),
        }


def costs(source: str, wanted: Wanted, size: Size, dtype: str | None = None) -> Costs:
    """Plan a method on a model that is never loaded.

    Raises:
        BadInput, UnknownMethod, ConfigError, TargetError, UnsupportedSite: it cannot be planned.
    """
    wanted.resolved()  # a wrong name or option is said before anything is built
    built = skeleton(source, dtype)
    model = built.model
    recorded = Recorded.of(wanted, model)
    file_size = size_of_file(recorded)
    weights, everything = held((*model.parameters(), *model.buffers())), list(model.parameters())
    operators = recorded.operators()
    adapter = held(tensor for each in operators for tensor in (*each.parameters(), *each.buffers()))
    trained = [parameter for each in operators for parameter in each.parameters()]
    found = activations(built, recorded, size)
    return Costs(
        skeleton=built,
        recorded=recorded,
        file_size=file_size,
        activations=found,
        memory=Memory.of(weights, adapter, trained, found.adapted),
        full=Memory.of(weights, 0, everything, found.full),
    )


def activations(built: Skeleton, recorded: Recorded, size: Size) -> Activations:
    """Count activations of the model as it is, then of the adapted one, which it is afterwards."""
    pretended = Pretended()
    batch = full = None
    try:
        batch = pretended.batch(built, size)
        full = pretended.kept(built.model, batch)
        with quiet(), explained():
            establish(recorded.surgeon, "planned")
            return Activations(batch, pretended.kept(built.model, batch), full)
    except Unknown as error:
        return Activations(batch, None, full, str(error))


def held(tensors: Iterable[Tensor]) -> int:
    """Count the bytes of distinct tensors."""
    return sum(each.numel() * each.element_size() for each in {id(each): each for each in tensors}.values())


def size_of_file(recorded: Recorded) -> int:
    """Return the bytes of ``adapter.safetensors``: eight for the header's length, the header, which is filled up to a
    multiple of eight, and the tensors, the widest numbers first."""
    planned = recorded.plan
    envelope = envelope_of(Injection("planned", recorded.surgeon, HostState()))
    header: dict[str, Any] = {"__metadata__": {METADATA: envelope.short}}
    start = 0
    for name in sorted(planned.shapes, key=lambda name: (-planned.dtypes[name].itemsize, name)):
        shape, dtype = planned.shapes[name], planned.dtypes[name]
        end = start + shape.numel() * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + start
