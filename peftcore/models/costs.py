"""Computes the costs of a method on a model: the parameters that it would add, and the memory and operations of a
training step."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from peftcore.errors import BadInput
from peftcore.files.envelope import envelope_of
from peftcore.files.formats.native import METADATA
from peftcore.files.safe_io import DTYPES
from peftcore.forward.state.host_state import HostState
from peftcore.injection.applying import install
from peftcore.injection.injection import Injection
from peftcore.models.activation_memory import ExampleBatch, Pretended, explained
from peftcore.models.dry_run import Recorded, RequestedMethod
from peftcore.models.example_inputs import Size, UnknownInputs
from peftcore.models.skeletons import Skeleton, skeleton
from peftcore.surgery.sharding import STATES, Shard
from peftcore.utils.quiet import quiet

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Passes:
    """The memory and the operations of a forward and its backward. Unknown values are None."""

    activations: int | None = None
    """Bytes that the forward keeps for its backward."""
    peak: int | None = None
    """The peak memory in bytes, with the model's tensors and the gradients, but without the optimizer's states."""
    flops: int | None = None
    """Floating-point operations of forward and backward, including forwards that backward runs again."""


@dataclass(frozen=True)
class Counted:
    """The costs of a forward and backward, for the adapted model and for full fine-tuning of the original model; or the
    reason why they are unknown."""

    batch: ExampleBatch | None = None
    adapted: Passes = Passes()
    full: Passes = Passes()
    unknown: str | None = None


@dataclass(frozen=True)
class Memory:
    """The memory of one training step, in bytes."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int | None
    gathered: int = 0
    """The weights that are gathered from the shards while the largest block runs."""
    within: int | None = None
    """The peak memory within forward and backward, as in `Passes.peak`."""

    @classmethod
    def of(cls, weights: int, adapter: int, trained: Iterable[Tensor], passes: Passes) -> Memory:
        gradients = held(trained)
        return cls(weights, adapter, gradients, STATES * gradients, passes.activations, within=passes.peak)

    @classmethod
    def of_shard(cls, shard: Shard, passes: Passes) -> Memory:
        return cls(**asdict(shard), activations=passes.activations)

    @property
    def total(self) -> int | None:
        """Return the sum of all parts; None if the activations are unknown. Memory that is allocated and freed within a
        step (gradients of activations, buffers of kernels) is not included."""
        known = self.weights + self.adapter + self.gradients + self.optimizer + self.gathered
        return None if self.activations is None else known + self.activations

    @property
    def peak(self) -> int | None:
        """Return the peak memory of a step in bytes; None if it is unknown. It is reached in forward and backward, or
        in the optimizer's step, when all gradients exist."""
        if self.within is None:
            return None
        return self.optimizer + max(self.within, self.weights + self.adapter + self.gradients)

    def as_dict(self) -> dict[str, int | None]:
        found = {**asdict(self), "total": self.total, "peak": self.peak}
        del found["within"]
        return found


@dataclass(frozen=True)
class Costs:
    """All costs that ``peftcore plan`` reports."""

    skeleton: Skeleton
    recorded: Recorded
    file_size: int
    counted: Counted
    memory: Memory
    full: Memory
    """The memory of a step of full fine-tuning."""
    sharded: tuple[Memory, ...] = ()
    """The memory of each process; empty unless a number of processes was given."""
    adapters: int = 1
    """The number of adapters that are in memory at once when the model is served."""

    @property
    def notes(self) -> tuple[str, ...]:
        return (*self.skeleton.notes, *self.recorded.notes)

    @property
    def resident(self) -> int:
        """Return the bytes of all `adapters` together, without the model's weights."""
        return self.adapters * self.recorded.plan.resident

    def as_dict(self) -> dict[str, Any]:
        batch = self.counted.batch
        return {
            **self.skeleton.as_dict(),
            **self.recorded.as_dict(),
            "file_size": self.file_size,
            "batch": None if batch is None else batch.shapes,
            "with_loss": batch is not None and batch.loss,
            "activations_unknown": self.counted.unknown,
            "memory": {"adapted": self.memory.as_dict(), "full": self.full.as_dict()},
            "flops": {"adapted": self.counted.adapted.flops, "full": self.counted.full.flops},
            "shards": [each.as_dict() for each in self.sharded],
            "resident": {"adapters": self.adapters, "bytes": self.resident},
            "notes": list(self.notes),
        }


def costs(
    source: str,
    wanted: RequestedMethod,
    size: Size,
    dtype: str | None = None,
    *,
    checkpointed: bool = False,
    shards: int | None = None,
    adapters: int = 1,
) -> Costs:
    """Compute the costs of a method on a model, without loading the model's weights.

    Args:
        source: the name of the model: a folder, a name on the Hub, or any other MODEL that commands accept.
        wanted: the method with its options.
        size: the size of a batch.
        dtype: the dtype of the weights; by default that of the configuration.
        checkpointed: whether gradient checkpointing is on, so that blocks run again in backward.
        shards: the number of processes over which the weights are sharded.
        adapters: the number of adapters that are in memory at once when the model is served.

    Raises:
        BadInput, UnknownMethod, ConfigError, TargetError, UnsupportedSite, UnsupportedHost: the method cannot be
            planned on this model.
    """
    wanted.resolved()  # a wrong name or option is said before anything is built
    built = skeleton(source, dtype)
    model = built.model
    blocks = repeating(model, source) if checkpointed else ()
    recorded = Recorded.of(wanted, model, shards)
    file_size = size_of_file(recorded)
    weights, everything = held((*model.parameters(), *model.buffers())), list(model.parameters())
    trained = [each for operator in recorded.operators() for each in operator.parameters() if each.requires_grad]
    adapter = recorded.plan.resident
    counted = count(built, recorded, size, blocks)
    return Costs(
        skeleton=built,
        recorded=recorded,
        file_size=file_size,
        counted=counted,
        memory=Memory.of(weights, adapter, trained, counted.adapted),
        full=Memory.of(weights, 0, everything, counted.full),
        sharded=tuple(Memory.of_shard(each, counted.adapted) for each in recorded.plan.shards),
        adapters=adapters,
    )


def repeating(model: nn.Module, source: str) -> Sequence[nn.Module]:
    """Turn on the model's gradient checkpointing, and return the blocks that backward runs again.

    Raises:
        BadInput: the model does not support gradient checkpointing.
    """
    blocks = checkpointable(model)
    if not blocks:
        raise BadInput(
            f"{source}: this model does not support gradient checkpointing; plan without --checkpoint-gradients"
        )
    with quiet():
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    return blocks


def checkpointable(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that backward runs again if gradient checkpointing of transformers is turned on."""
    transformers = sys.modules.get("transformers")
    kind = () if transformers is None else transformers.modeling_layers.GradientCheckpointingLayer
    return [each for each in model.modules() if isinstance(each, kind)]


def count(built: Skeleton, recorded: Recorded, size: Size, blocks: Sequence[nn.Module] = ()) -> Counted:
    """Count the costs of a forward and backward of the original model, then of the adapted model, on tensors without
    values. The adapter remains on the model."""
    pretended = Pretended()
    batch, full, adapted = None, Passes(), Passes()
    try:
        batch = pretended.batch(built, size)
        full = passes(pretended, built.model, batch, blocks)
        with quiet(), explained():
            install(recorded.surgeon, recorded.request)
        adapted = passes(pretended, built.model, batch, blocks)
    except UnknownInputs as error:
        return Counted(batch, adapted, full, str(error))
    return Counted(batch, adapted, full)


def passes(pretended: Pretended, model: nn.Module, batch: ExampleBatch, blocks: Sequence[nn.Module]) -> Passes:
    """Count the memory and the operations of a forward and its backward."""
    activations = pretended.kept(model, batch, blocks)
    watch = pretended.step(model, batch)
    return Passes(activations, watch.peak, watch.flops)


def held(tensors: Iterable[Tensor]) -> int:
    """Count the bytes of distinct tensors."""
    return sum(each.numel() * each.element_size() for each in {id(each): each for each in tensors}.values())


def size_of_file(recorded: Recorded) -> int:
    """Return the size of the file ``adapter.safetensors`` in bytes. The file has eight bytes for the length of the
    header, the header padded to a multiple of eight bytes, and the tensors. Tensors with the widest dtype are first."""
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
