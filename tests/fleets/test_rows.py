"""Batches put together, outputs taken apart."""

from typing import Any

import pytest
import torch
from torch import Tensor

from peftcore.errors import TrainingError
from peftcore.fleets.rows import count_of, taken, together

ONE = {"ids": torch.tensor([[1, 2, 3]]), "names": ["x"], "flag": True}
TWO = {"ids": torch.tensor([[4, 5, 6], [7, 8, 9]]), "names": ["y", "z"], "flag": True}


def test_rows_of_all_come_in_order() -> None:
    made = together({"a": ONE, "b": TWO}, {}, None)
    assert made["ids"].tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert made["names"] == ["x", "y", "z"] and made["flag"] is True


def test_shorter_ones_are_filled_up_at_the_end_of_each_dimension() -> None:
    a, b = torch.ones(1, 2, 3), torch.ones(2, 3, 2)
    made = together({"a": {"x": a}, "b": {"x": b}}, {"x": 9}, None)["x"]
    assert made.tolist() == [
        [[1, 1, 1], [1, 1, 1], [9, 9, 9]],
        [[1, 1, 9], [1, 1, 9], [1, 1, 9]],
        [[1, 1, 9], [1, 1, 9], [1, 1, 9]],
    ]


def test_a_collate_function_puts_them_together_instead() -> None:
    def collate(batches: list[Any]) -> dict[str, Tensor]:
        return {"ids": torch.cat([each["ids"].flip(1) for each in batches])}

    assert together({"a": ONE, "b": TWO}, {}, collate)["ids"][0].tolist() == [3, 2, 1]
    with pytest.raises(TrainingError, match="returned 1 rows for 3"):
        together({"a": ONE, "b": TWO}, {}, lambda batches: batches[0])


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"ids": torch.ones(2, 4, dtype=torch.int64), "names": ["y", "z"], "flag": True}, r"pad=\{'ids': \.\.\.\}"),
        ({"ids": torch.ones(2, 3), "names": ["y", "z"], "flag": True}, "different dtypes"),
        ({"ids": torch.ones(2, 3, 1, dtype=torch.int64), "names": ["y", "z"], "flag": True}, "dimensions"),
        ({"ids": TWO["ids"], "names": ["y", "z"]}, "same names"),
        ({**TWO, "flag": False}, "differs between a, b"),
    ],
)
def test_what_does_not_fit_is_refused(other: Any, text: str) -> None:
    with pytest.raises(TrainingError, match=text):
        together({"a": ONE, "b": other}, {}, None)


@pytest.mark.parametrize("batch", [torch.ones(2), {"x": torch.ones(2), "y": torch.ones(3)}, {"x": torch.ones(0)}, {}])
def test_what_is_no_batch_is_refused(batch: Any) -> None:
    with pytest.raises(TrainingError, match="'a'"):
        count_of(batch, "a")


def test_rows_are_taken_of_what_has_rows() -> None:
    """A list that is the same for all is as long as the batch by accident."""
    shared = {"scale": torch.tensor(2.0), "sizes": [4, 5, 6], "flag": None}
    made = together({"a": {**ONE, **shared}, "b": {**TWO, **shared}}, {}, None)
    found = taken(made, [2, 0])
    assert found["ids"].tolist() == [[7, 8, 9], [1, 2, 3]] and found["names"] == ["z", "x"]
    assert found["sizes"] == [4, 5, 6] and found["scale"] is made["scale"] and found["flag"] is None
    collated = together({"a": ONE, "b": TWO}, {}, lambda batches: {"ids": torch.ones(3, 1), "names": ["p", "q", "r"]})
    assert taken(collated, [1])["names"] == ["q"]
