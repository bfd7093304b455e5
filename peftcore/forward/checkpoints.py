"""Which forward a checkpoint repeats: the object that torch keeps of a checkpoint from its forward to its backward also
keeps the forward context that its modules ran in.

Nothing public tells a checkpoint from another one, so torch's own objects are looked for: of a non-reentrant checkpoint
the frame that its saved-tensor hooks hold, of a reentrant one the context of its autograd function. A checkpoint of
another library has neither; what it repeats is told by the outputs of the forward (`peftcore.forward.context`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

import torch
from torch.utils import checkpoint

from peftcore.errors import AmbiguousBackward

RECORD = "_peftcore_contexts"
FRAME = vars(checkpoint).get("_CheckpointFrame", type(None))
"""What torch keeps of a non-reentrant checkpoint."""
HOOK = "unpack_hook"
"""The function that repeats it, with the frame as a variable."""
_FORWARD: CodeType = checkpoint.CheckpointFunction.forward.__code__
_BACKWARD: CodeType = checkpoint.CheckpointFunction.backward.__code__
_top = vars(torch._C._autograd).get("_top_saved_tensors_default_hooks", lambda ignored: None)


def remember(state: object, context: Any) -> None:
    """Keep the context in which modules of a host run for the checkpoint that this code is in, if it is in one."""
    kept = _running()
    if kept is None:
        return
    record = vars(kept).setdefault(RECORD, {})
    before = record.setdefault(id(state), context)
    if before is not context:
        record[id(state)] = None  # the choice changed inside of the checkpoint


def remembered(state: object) -> Any:
    """Returns the context of the forward that is repeated now, inside backward; None where no checkpoint tells.

    Raises:
        AmbiguousBackward: the choice changed inside of the checkpoint.
    """
    for kept in _repeated():
        record = vars(kept).get(RECORD)
        if record is not None and id(state) in record:
            if record[id(state)] is None:
                raise AmbiguousBackward(
                    "the choice of adapters changed inside of a checkpoint, which runs again in backward: choose before "
                    "the checkpoint, and outside of it"
                )
            return record[id(state)]
    return None


def _running() -> Any:
    """Returns what torch keeps of the innermost checkpoint whose forward this is."""
    if not torch.is_grad_enabled():  # as in a reentrant one
        return next(_locals("ctx", _FORWARD), None)
    top = _top(False)
    if top is None:
        return None
    held = dict(zip(top[0].__code__.co_freevars, top[0].__closure__ or (), strict=False)).get("frame")
    return held.cell_contents if held is not None and isinstance(held.cell_contents, FRAME) else None


def _repeated() -> Iterator[Any]:
    """Yields what torch keeps of the checkpoints that run again now, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code is _BACKWARD:
            yield frame.f_locals["ctx"]
        elif code.co_name == HOOK and code.co_filename == checkpoint.__file__:
            yield frame.f_locals["frame"]
        frame = frame.f_back


def _locals(name: str, code: CodeType) -> Iterator[Any]:
    """Yields a variable of the running calls of a function, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            yield frame.f_locals[name]
        frame = frame.f_back
