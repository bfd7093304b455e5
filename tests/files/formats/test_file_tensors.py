"""Tensors of one place in a foreign file: all that is wrong is collected."""

from collections.abc import Sequence

import torch
from torch import Size, Tensor

from peftcore.files.formats.file_tensors import Found

VALUES = {"x.A": torch.arange(6.0).view(2, 3), "x.B": torch.ones(3, 2, 1, 1)}


def place(wrong: list[str], names: Sequence[str] = ("A", "B")) -> Found:
    def read(name: str) -> Tensor:
        return VALUES[name]

    shapes = {name: Size(value.shape) for name, value in VALUES.items()}
    return Found({name: f"x.{name}" for name in names}, shapes, read, wrong)


def test_a_tensor_is_taken_in_the_shape_that_is_wanted() -> None:
    wrong: list[str] = []
    found = place(wrong)
    assert found.has("A") and not found.has("C") and found.shape("B") == Size([3, 2, 1, 1])
    assert torch.equal(found.take("A", (2, 3)), VALUES["x.A"])
    assert found.take("B", (3, 2), (3, 2, 1, 1)).shape == (3, 2)
    assert found.used == {"x.A", "x.B"} and not wrong


def test_what_is_missing_or_misshaped_is_noted_and_zero_for_now() -> None:
    wrong: list[str] = []
    found = place(wrong)
    assert torch.equal(found.take("A", (3, 2)), torch.zeros(3, 2))
    assert torch.equal(found.take("C", (4,)), torch.zeros(4))
    assert wrong == ["x.A has shape (2, 3), expected (3, 2)", "missing C next to x.A"]
    assert found.used == {"x.A"}


def test_what_stands_for_a_missing_tensor_takes_no_memory() -> None:
    assert place([]).take("C", (1000, 1000)).untyped_storage().nbytes() == 4
