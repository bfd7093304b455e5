"""Reads tensors of another library's file one by one, each with its expected shape, and collects all missing, misshaped
and unused tensors for one error at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Size, Tensor


@dataclass
class Found:
    """The tensors that a file has for one place: a module, or the whole adapter."""

    names: Mapping[str, str]
    """Full names of the tensors in the file, keyed by the part of the name below the place: ``"lora_A.weight"``."""
    shapes: Mapping[str, Size]
    """Shapes of all tensors in the file, keyed by full name."""
    read: Callable[[str], Tensor]
    """Returns the values of the tensor with this full name."""
    wrong: list[str]
    """The errors found in the file so far; all places share this list."""
    used: set[str] = field(default_factory=set)
    """Full names of the tensors that were read; all places share this set."""

    def has(self, name: str) -> bool:
        """Whether the place has such a tensor."""
        return name in self.names

    def shape(self, name: str) -> Size:
        """Returns the shape of a tensor, which has to exist."""
        return self.shapes[self.names[name]]

    def take(self, name: str, *shapes: Sequence[int]) -> Tensor:
        """Returns the values of a tensor in the first of `shapes`. The file may have any of `shapes`, which all have
        the same number of values.

        If the tensor is missing or has another shape, the error is recorded, and zeros that need no memory are
        returned. Later the whole file is refused, or with `strict=False` the place keeps its fresh values.
        """
        expected = tuple(shapes[0])
        full = self.names.get(name)
        if full is None:
            self.wrong.append(f"missing {name} next to {min(self.names.values(), default='the others')}")
            return torch.zeros(()).expand(expected)
        self.used.add(full)
        if tuple(self.shapes[full]) not in [tuple(shape) for shape in shapes]:
            self.wrong.append(f"{full} has shape {tuple(self.shapes[full])}, expected {expected}")
            return torch.zeros(()).expand(expected)
        return self.read(full).reshape(expected)
