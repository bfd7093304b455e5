"""Tensors in another library's file: taken one by one with the shape that they must have, so that what is missing,
misshaped or left over is known at the end, all of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Size, Tensor


@dataclass
class Found:
    """The tensors of one place: of a module, or those that belong to the whole adapter."""

    names: Mapping[str, str]
    """Their full names in the file, by what stands below the place: ``"lora_A.weight"``."""
    shapes: Mapping[str, Size]
    """Shapes of all tensors in the file, by full name."""
    read: Callable[[str], Tensor]
    """The values of one tensor, by full name."""
    wrong: list[str]
    """What is wrong with the file, collected by all places."""
    used: set[str] = field(default_factory=set)
    """Full names that were taken, collected by all places."""

    def has(self, name: str) -> bool:
        """Whether the place has such a tensor."""
        return name in self.names

    def shape(self, name: str) -> Size:
        """The shape of a tensor that is there."""
        return self.shapes[self.names[name]]

    def take(self, name: str, *shapes: Sequence[int]) -> Tensor:
        """The values of a tensor, in the first of `shapes`; others that the file may have must hold as many values.

        Where it is missing or has none of these shapes that is noted, and zeros are returned, which take no memory: the
        file is refused later, when all of it was looked at, or the place left as it is.
        """
        expected = tuple(shapes[0])
        full = self.names.get(name)
        if full is None:
            self.wrong.append(f"missing {name} beside {min(self.names.values(), default='the others')}")
            return torch.zeros(()).expand(expected)
        self.used.add(full)
        if tuple(self.shapes[full]) not in [tuple(shape) for shape in shapes]:
            self.wrong.append(f"{full} has shape {tuple(self.shapes[full])}, expected {expected}")
            return torch.zeros(()).expand(expected)
        return self.read(full).reshape(expected)
