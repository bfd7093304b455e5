"""Finds the forward that an activation checkpoint repeats. Torch has an object for each checkpoint from its forward to
its backward. The forward context of the modules in the checkpoint is stored in this object.

Torch has no public way to identify a checkpoint. So this module searches the call stack for torch's object: the frame
of the saved-tensor hooks for a non-reentrant checkpoint, the context of the autograd function for a reentrant one.
Checkpoints of other libraries lack this object. Their forward is found through the autograd nodes of the outputs
(`peftcore.forward.context.context`).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import CodeType, FrameType, GeneratorType
from typing import Any

import torch
from torch.utils import checkpoint

from peftcore.errors import AmbiguousBackward

RECORD = "_peftcore_contexts"
HOOK = "unpack_hook"
"""The name of torch's function that repeats a non-reentrant checkpoint. It has the checkpoint's object as a local
variable."""
_CHECKPOINT: CodeType = inspect.unwrap(checkpoint.checkpoint).__code__
"""The code of torch's function that runs a checkpoint. The checkpoint's object is found in a generator, a local
variable of this function."""
_FORWARD: CodeType = checkpoint.CheckpointFunction.forward.__code__
_BACKWARD: CodeType = checkpoint.CheckpointFunction.backward.__code__
_top = vars(torch._C._autograd).get("_top_saved_tensors_default_hooks", lambda ignored: None)


def remember(kept: Any, state: object, choice: object, context: Any) -> None:
    """Store a host's current choice of active adapters and its forward context in a checkpoint."""
    record: dict[int, Any] = vars(kept).setdefault(RECORD, {})
    before = record.setdefault(id(state), (choice, context))
    if before is not None and before[0] is not choice:
        record[id(state)] = None


def remembered(state: object | None) -> tuple[Any, Any] | None:
    """Returns the choice of active adapters and the context of the forward that backward now repeats. None if no
    checkpoint has stored them.

    Args:
        state: the state of the host; None for the host whose modules ran last in the checkpoint.

    Raises:
        AmbiguousBackward: the choice changed inside the checkpoint.
    """
    for kept in _repeated():
        record = vars(kept).get(RECORD, {})
        key = id(state) if state is not None else next(reversed(record), None)
        if key in record:
            if record[key] is None:
                raise AmbiguousBackward(
                    "the active adapters changed inside a checkpointed block, which backward runs again: choose them "
                    "outside the checkpoint, before it begins"
                )
            found: tuple[Any, Any] = record[key]
            return found
    return None


def running() -> list[Any]:
    """Returns torch's object for each checkpoint whose forward is running now."""
    if torch.is_grad_enabled() and _top(False) is None:  # no hooks on saved tensors, as nearly always
        return []
    found = []
    for frame in _stack():
        if frame.f_code is _FORWARD:
            found.append(frame.f_locals["ctx"])
        elif frame.f_code is _CHECKPOINT and isinstance(begun := frame.f_locals.get("gen"), GeneratorType):
            found.append(begun.gi_frame.f_locals["new_frame"])  # type: ignore[union-attr]  # it waits for the function
    return found


def reentrant() -> int | None:
    """Returns the `id` of the innermost reentrant checkpoint whose forward is running now; None outside of such
    checkpoints. A reentrant checkpoint gives gradients only to the arguments of its function."""
    return next((id(frame.f_locals["ctx"]) for frame in _stack() if frame.f_code is _FORWARD), None)


def _repeated() -> Iterator[Any]:
    """Yields torch's objects for the checkpoints that backward runs again now, the innermost first."""
    for frame in _stack():
        if frame.f_code is _BACKWARD:
            yield frame.f_locals["ctx"]
        elif frame.f_code.co_name == HOOK and frame.f_code.co_filename == checkpoint.__file__:
            yield frame.f_locals["frame"]


def _stack() -> Iterator[FrameType]:
    """Yields the frames of the running calls, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
