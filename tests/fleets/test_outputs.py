"""The rows of a member in an output: known from two forwards, never guessed by lengths."""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor

from peftcore.errors import TrainingError
from peftcore.fleets.outputs import FEW, MORE, NotCut, Outputs


class Output(dict[str, Any]):
    pass


@dataclasses.dataclass
class Record:
    logits: Tensor
    scale: float


Pair = namedtuple("Pair", ["x", "table"])
ROWS = 4


def made(rows: int) -> Output:
    """What a model may return for so many rows; much of it has four of something else."""
    x = torch.arange(rows * 4.0).view(rows, 4)
    return Output(
        logits=x,
        table=torch.ones(4, 2),
        states=(x[:, None], [x.clone(), torch.ones(4)]),
        similar=x @ x.T,
        behind=torch.ones(2, rows),
        flat=torch.ones(rows * 4, 3),
        mean=x.mean(),
        scale=torch.tensor(2.0),
        words=[str(row) for row in range(rows)],
        names=["p", "q", "r", "s"],
        pictures=[torch.full((2,), float(row)) for row in range(rows)],
        record=Record(x * 2, 3.0),
        pair=Pair(x, torch.ones(4)),
        cache=object(),
        nothing=None,
        count=4,
    )


def known() -> Outputs:
    outputs = Outputs()
    assert not outputs.learned and not outputs.know(made(ROWS))
    outputs.learn(made(FEW), made(MORE))
    return outputs


def test_what_goes_with_the_number_of_rows_is_cut_and_nothing_else() -> None:
    outputs, output = known(), made(ROWS)
    assert outputs.learned and outputs.know(output)
    found = outputs.part(output, 1, 3, ROWS)
    assert type(found) is Output
    assert found["logits"].tolist() == output["logits"][1:3].tolist()
    assert found["states"][0].shape == (2, 1, 4) and found["states"][1][0].shape == (2, 4)
    assert found["states"][1][1] is output["states"][1][1] and found["table"] is output["table"]
    assert found["similar"].tolist() == output["similar"][1:3, 1:3].tolist(), "its rows with its rows"
    assert found["behind"].shape == (2, 2)
    assert found["scale"] is output["scale"] and found["names"] == output["names"]
    assert found["words"] == ["1", "2"] and [each[0].item() for each in found["pictures"]] == [1, 2]
    assert found["record"].logits.shape == (2, 4) and found["record"].scale == 3.0
    assert found["pair"].x.shape == (2, 4) and found["pair"].table.shape == (4,)
    assert found["nothing"] is None and found["count"] == 4


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("flat", r"has entries for several rows or dimensions: \(8, 3\) for 2, \(12, 3\) for 3"),
        ("mean", "is one value computed from the rows of all members"),
        ("cache", "is a object"),
    ],
)
def test_what_cannot_be_cut_is_an_error_that_names_it_when_it_is_read(name: str, why: str) -> None:
    found = known().part(made(ROWS), 0, 2, ROWS)[name]
    assert isinstance(found, NotCut) and name in repr(found)
    uses: list[Any] = [
        lambda: found.shape,
        lambda: found[0],
        lambda: found + 1,
        lambda: 1 - found,
        lambda: [*found],
        lambda: float(found),
        lambda: torch.nn.functional.softmax(found, -1),
        lambda: torch.stack([torch.ones(()), found]),
        lambda: torch.ones(2) * found,
        lambda: bool(found),
    ]
    for use in uses:
        with pytest.raises(TrainingError, match=f"reads {name} of the model's output, which {why}"):
            use()


def test_gradients_go_to_own_rows() -> None:
    output = made(ROWS)
    x = output["logits"].requires_grad_()
    known().part(output, 1, 3, ROWS)["logits"].sum().backward()
    assert x.grad is not None and x.grad[:, 0].tolist() == [0, 1, 1, 0]


def test_another_output_has_to_be_learned() -> None:
    outputs = known()
    assert not outputs.know({**made(ROWS), "more": torch.ones(4)})
    assert not outputs.know({**made(ROWS), "logits": torch.ones(4)})
    assert isinstance(outputs.part({"logits": torch.ones(5, 4)}, 0, 2, ROWS)["logits"], NotCut), "other rows"
    with pytest.raises(TrainingError, match="other contents for 2 rows than for 3"):
        Outputs().learn({"a": torch.ones(2)}, {"b": torch.ones(3)})


def test_an_output_may_be_one_tensor() -> None:
    outputs = Outputs()
    outputs.learn(torch.ones(2, 5), torch.ones(3, 5))
    assert outputs.know(torch.ones(7, 5))
    assert outputs.part(torch.ones(7, 5), 2, 5, 7).shape == (3, 5)
