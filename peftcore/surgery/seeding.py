"""Seeds for the initial values of operators. The random numbers depend only on the seed and the path of the target
module. The global random generator is restored afterwards."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

DTYPE = torch.float32
"""The dtype in which operators are built. They are converted to their own dtype afterwards."""
OF_DEFAULT_DTYPE = frozenset(
    {torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.eye, torch.linspace,
     torch.logspace}
)  # fmt: skip
"""Functions whose result has torch's default dtype if no dtype is passed."""
OF_NUMBERS = frozenset({torch.full, torch.tensor, torch.as_tensor, torch.scalar_tensor, torch.arange})
"""Functions whose result has torch's default dtype if no dtype is passed and their input is floating-point numbers."""


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Context manager that restores the state of the global random generator at its end."""
    before = torch.default_generator.get_state()
    try:
        yield
    finally:
        torch.default_generator.set_state(before)


def seed_by_path(seed: int, path: str) -> None:
    """Seed torch's generator. The seed depends only on `seed` and `path`."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    torch.default_generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def one_dtype() -> AbstractContextManager[Any]:
    """Context manager in which new tensors are float32 unless a dtype is passed, whatever torch's default dtype is. A
    seed would give other numbers in another dtype. It applies only to this thread. Torch's default dtype, which all
    threads share, does not change."""
    return contextlib.nullcontext() if torch.get_default_dtype() is DTYPE else _InOneDtype()


class _InOneDtype(TorchFunctionMode):
    """Torch function mode that adds a dtype to calls that make tensors without one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("dtype") is None and (
            func in OF_DEFAULT_DTYPE or (func in OF_NUMBERS and any(map(_holds_floats, (*args, *kwargs.values()))))
        ):
            kwargs = {**kwargs, "dtype": DTYPE}
        return func(*args, **kwargs)


def _holds_floats(value: Any) -> bool:
    """Whether a value is a floating-point number or a list that contains one."""
    if isinstance(value, list | tuple):
        return any(map(_holds_floats, value))
    return isinstance(value, float)
