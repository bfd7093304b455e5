"""Tensors in another library's file: taken one by one with the shape that they must have, so that all that are missing,
misshaped or left over are known at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Size, Tensor


@dataclass
class Found:
    """The tensors of one place: of a module, or of the whole adapter."""

    names: Mapping[str, str]
    """Full names of the tensors in the file, by their names below the place: ``"lora_A.weight"``."""
    shapes: Mapping[str, Size]
    """Shapes of all tensors in the file, by full name."""
    read: Callable[[str], Tensor]
    """The values of one tensor, by full name."""
    wrong: list[str]
    """The errors in the file, collected by all places."""
    used: set[str] = field(default_factory=set)
    """Full names that were taken, collected by all places."""

    def has(self, name: str) -> bool:
        """Whether the place has such a tensor."""
        return name in self.names

    def shape(self, name: str) -> Size:
        """Returns the shape of a tensor that is there."""
        return self.shapes[self.names[name]]

    def take(self, name: str, *shapes: Sequence[int]) -> Tensor:
        """Returns the values of a tensor, in the first of `shapes`; others that the file may have must hold as many
        values.

        A missing tensor, or one of another shape, is recorded, and zeros are returned, which take no memory: the
        file is refused later, when all of it was read, or the place left as it is.
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
