"""Counts the memory that a forward saves for its backward, without allocating it.

The model runs with torch's fake tensors, which have no values but behave as if they were on the CPU. So each operation
uses the same kernel as on a CPU, and saves the same tensors for backward. Tensors on the meta device would use other
kernels, which save more tensors of an attention.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from peftcore.errors import BadInput, PeftcoreError
from peftcore.models.example_inputs import Size, UnknownInputs
from peftcore.models.resource_counters import StorageCounter
from peftcore.models.skeletons import Skeleton

Inputs = dict[str, Any]
Run = Callable[[Inputs], Any]


@dataclass(frozen=True)
class ExampleBatch:
    """The inputs of one forward. They include labels if the model computes a loss from labels; then `loss` is True."""

    inputs: Inputs
    loss: bool

    @classmethod
    def of(cls, skeleton: Skeleton, size: Size, run: Run) -> ExampleBatch:
        """Build a batch of the given size for a skeleton (a model without weights). `run` is a function that runs the
        model on inputs and returns its outputs."""
        inputs = skeleton.inputs(size)
        with torch.no_grad():
            labelled = skeleton.with_labels(inputs, run(inputs))
            try:
                run(labelled)
            except Exception:  # labels of another kind than classes: there is no list of what models raise then
                return cls(inputs, False)
        return cls(labelled, labelled is not inputs)

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Return the shapes of the tensors among the inputs."""
        return {name: list(each.shape) for name, each in self.inputs.items() if isinstance(each, Tensor)}


def kept(tensors: Mapping[str, Tensor], run: Run, inputs: Inputs, repeated: Collection[nn.Module] = ()) -> int:
    """Count the bytes that a forward saves for backward. Each storage counts once, and storages of the model's own
    tensors do not count.

    Args:
        tensors: the model's tensors.
        run: the forward.
        inputs: the inputs of the forward.
        repeated: blocks that backward runs again (gradient checkpointing). For these, the inputs of all blocks are
            counted, and the tensors that one block saves when it runs again: the block that saves most.
    """
    own = {_storage(each) for each in tensors.values()}
    outside: dict[int, Tensor] = {}  # alive until the end: a storage that is freed gives its address to the next
    inside: list[dict[int, Tensor]] = []
    now = [outside]

    def save(tensor: Tensor) -> Tensor:
        now[-1].setdefault(_storage(tensor), tensor)
        return tensor

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        for each in tree_leaves((args, kwargs)):
            if isinstance(each, Tensor):
                save(each)
        inside.append({})
        now.append(inside[-1])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        now.pop()

    hooks = [each.register_forward_pre_hook(enter, with_kwargs=True) for each in repeated]
    hooks += [each.register_forward_hook(leave) for each in repeated]
    try:
        with torch.enable_grad(), saved_tensors_hooks(save, lambda tensor: tensor):
            run(inputs)
    finally:
        for each in hooks:
            each.remove()

    def size(saved: Mapping[int, Tensor], but: Collection[int]) -> int:
        return sum(each.untyped_storage().nbytes() for storage, each in saved.items() if storage not in but)

    return size(outside, own) + max((size(each, {*own, *outside}) for each in inside), default=0)


def _storage(tensor: Tensor) -> int:
    place: int = tensor.untyped_storage()._cdata
    return place


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model by name. A tied tensor occurs under each of its names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


@dataclass
class Pretended:
    """Runs models on the meta device with torch's fake tensors. Batches made by one object can be passed to several
    models."""

    mode: FakeTensorMode = field(default_factory=lambda: FakeTensorMode(allow_non_fake_inputs=True))

    def batch(self, skeleton: Skeleton, size: Size) -> ExampleBatch:
        """Build a batch for a skeleton (a model without weights).

        Raises:
            UnknownInputs: the model's forward cannot run without values.
        """
        with explained(), self.mode:
            tensors = self._tensors(skeleton.model)
            return ExampleBatch.of(
                skeleton, size, lambda inputs: functional_call(skeleton.model, tensors, kwargs=inputs)
            )

    def kept(self, model: nn.Module, batch: ExampleBatch, repeated: Collection[nn.Module] = ()) -> int:
        """Count the bytes that a forward saves for backward. `repeated` are the blocks that backward runs again
        (gradient checkpointing).

        Raises:
            UnknownInputs: the forward cannot run without values.
        """
        with explained(), self.mode:
            tensors = self._tensors(model)
            return kept(tensors, lambda inputs: functional_call(model, tensors, kwargs=inputs), batch.inputs, repeated)

    def step(self, model: nn.Module, batch: ExampleBatch) -> StorageCounter:
        """Run a forward and its backward, and return a counter with the operations and the peak memory. The memory
        includes the model's tensors and the gradients of its parameters.

        Raises:
            UnknownInputs: forward or backward cannot run without values.
        """
        with explained(), self.mode:
            tensors = self._tensors(model)
            inputs = [each for each in batch.inputs.values() if isinstance(each, Tensor)]
            watch = StorageCounter([*tensors.values(), *inputs])
            with watch:
                named = {f"model.{name}": each for name, each in tensors.items()}
                functional_call(_Step(model, batch.loss), named, (batch.inputs,))
            return watch

    def _tensors(self, model: nn.Module) -> dict[str, Tensor]:
        named, made = named_tensors(model), dict[int, Tensor]()
        for each in named.values():
            if id(each) not in made:
                made[id(each)] = stand_in(each)
        return {name: made[id(each)] for name, each in named.items()}


class _Step(nn.Module):
    """A module whose forward runs the model's forward and backward. So blocks that backward runs again use the same
    fake tensors."""

    def __init__(self, model: nn.Module, has_loss: bool) -> None:
        super().__init__()
        self.model, self._has_loss = model, has_loss

    def forward(self, inputs: Inputs) -> None:
        if self._has_loss:  # all but the loss is let go before backward, as a trainer does
            self.model(**inputs)["loss"].backward()
            return
        outputs = tree_leaves(self.model(**inputs))
        values = [each for each in outputs if isinstance(each, Tensor) and each.requires_grad]
        torch.autograd.backward(values, [torch.ones_like(each) for each in values])


def stand_in(tensor: Tensor) -> Tensor:
    """Return an empty tensor of the same shape and dtype; a parameter if `tensor` is a parameter."""
    like = torch.empty(tensor.shape, dtype=tensor.dtype)
    return nn.Parameter(like, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else like


@contextmanager
def explained() -> Iterator[None]:
    """Context manager that turns any error of a forward into `UnknownInputs`, whose message is the reason why costs are
    unknown. Torch's log messages about the error are suppressed."""
    log = logging.getLogger(FakeTensorMode.__module__)
    level = log.level
    try:
        log.setLevel(logging.CRITICAL)
        yield
    except (BadInput, UnknownInputs):
        raise
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UnknownInputs("its forward depends on values, not only on shapes") from error
    except PeftcoreError as error:
        raise UnknownInputs(str(error)) from error
    except Exception as error:
        raise UnknownInputs(
            f"its forward fails on tensors without data: {' '.join(str(error).split())[:200]}"
        ) from error
    finally:
        log.setLevel(level)
