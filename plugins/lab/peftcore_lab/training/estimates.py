"""Estimates the memory of a step of a run, for advice after a run was out of memory. Estimates use only shapes, take a
few seconds, and never raise errors."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from peftcore.injection.applying import install
from peftcore.models.activation_memory import ExampleBatch, Pretended
from peftcore.models.costs import Memory, Passes, checkpointable, held
from peftcore.models.dry_run import Recorded, RequestedMethod
from peftcore.models.example_inputs import Size
from peftcore.models.skeletons import Skeleton, skeleton
from peftcore.utils.quiet import quiet

SECONDS = 10.0
"""Time limit in seconds, after which nothing more is estimated."""


@dataclass(frozen=True)
class Step:
    """The settings on which the memory of a step depends."""

    batch_size: int
    dtype: str
    checkpointed: bool = False
    """Whether blocks run again in backward."""


@dataclass
class Estimates:
    """Estimates the memory of steps of a method on a model, as ``peftcore plan`` does.

    Args:
        model: the name of the model, as for ``peftcore plan``.
        wanted: the method; None trains every parameter.
        length: the number of tokens of an example.
        seconds: the time limit, after which no estimate is returned.
    """

    model: str
    wanted: RequestedMethod | None
    length: int | None = None
    seconds: float = SECONDS
    _began: float = field(default_factory=lambda: time.monotonic())
    _pretended: Pretended = field(default_factory=Pretended)
    _adapted: dict[str, tuple[Skeleton, int]] = field(default_factory=dict)
    _batches: dict[tuple[str, int], ExampleBatch] = field(default_factory=dict)
    _building: float = 0.0
    """Seconds that building the last model took."""
    _counting: float = 0.0
    """Seconds that the last estimate took."""

    def of(self, step: Step) -> int | None:
        """Return the memory of a step in bytes; None if it cannot be estimated, or not within the time limit."""
        expected = self._counting + (0.0 if step.dtype in self._adapted else self._building)
        if time.monotonic() - self._began + expected > self.seconds:
            return None
        try:
            with quiet():
                return self._counted(step)
        except Exception:  # there is no list of what models raise, and the error that this goes with is another one
            return None

    def _counted(self, step: Step) -> int | None:
        began = time.monotonic()
        if step.dtype not in self._adapted:
            self._adapted[step.dtype] = self._built(step.dtype)
            self._building = time.monotonic() - began
            began = time.monotonic()
        built, weights = self._adapted[step.dtype]
        blocks = checkpointable(built.model) if step.checkpointed else []
        if step.checkpointed and not blocks:
            return None
        key = step.dtype, step.batch_size
        if key not in self._batches:
            self._batches[key] = self._pretended.batch(built, Size(step.batch_size, self.length))
        trained = [each for each in built.model.parameters() if each.requires_grad]
        everything = held((*built.model.parameters(), *built.model.buffers()))
        kept = self._pretended.kept(built.model, self._batches[key], blocks)
        self._counting = time.monotonic() - began
        return Memory.of(weights, everything - weights, trained, Passes(kept)).total

    def _built(self, dtype: str) -> tuple[Skeleton, int]:
        """Return the adapted model, and the bytes of its weights without the adapter."""
        built = skeleton(self.model, dtype)
        weights = held((*built.model.parameters(), *built.model.buffers()))
        if self.wanted is not None:
            recorded = Recorded.of(self.wanted, built.model)
            install(recorded.surgeon, recorded.request)
        return built, weights
