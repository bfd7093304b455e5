"""Seeds of operators: their random numbers depend on the seed and the path of the target module alone, and the global
generator is restored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Context manager that restores the global random generator."""
    before = torch.default_generator.get_state()
    try:
        yield
    finally:
        torch.default_generator.set_state(before)


def seed_by_path(seed: int, path: str) -> None:
    """Seed the next random numbers by (seed, path) alone."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    torch.default_generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
