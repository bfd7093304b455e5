"""The last rows of a table, frozen: looked up, multiplied, and merged alike."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.contract.surgeon_protocol import Wishes
from peftcore.errors import HostMismatch
from peftcore.injection.applying import apply_request
from peftcore.injection.request import Request, resolve_method
from peftcore.surgery.table_rows import TableRows


class Model(nn.Module):
    """A table and a head."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=bias)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.inner(self.table(ids)))


IDS = torch.tensor([[0, 6, 7, 8], [8, 3, 2, 7]])


def with_rows(model: nn.Module, rows: dict[str, tuple[int, int]], **wishes: Any) -> peftcore.Injection:
    method, config = resolve_method("lora", {"rank": 2})
    wished = Wishes(target="inner", rows=rows, **wishes)
    injection = apply_request(Request(model, method, config, wished, name="lora"))
    for operator in injection.operators.values():
        if isinstance(operator, TableRows):
            for value in operator.buffers():
                nn.init.normal_(value)
    return injection


@pytest.mark.parametrize("start", [0, 7, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_they_stand_for_the_tables_own(bias: bool, start: int) -> None:
    model = Model(bias)
    expected = copy.deepcopy(model)
    injection = with_rows(model, {"table": (start, 9), "head": (start, 9)})
    operators: Any = injection.operators
    with torch.no_grad():
        expected.table.weight[start:] = operators["table:rows"].value
        expected.head.weight[start:] = operators["head:rows"].value
        if bias:
            expected.head.bias[start:] = operators["head:rows"].bias
    torch.testing.assert_close(model(IDS), expected(IDS))
    assert not list(operators["table:rows"].parameters())
    injection.merge()
    torch.testing.assert_close(model(IDS), expected(IDS))
    assert torch.equal(model.table.weight, expected.table.weight)
    injection.unmerge()
    torch.testing.assert_close(model(IDS), expected(IDS))


def test_whatever_dtype_the_model_has() -> None:
    model = Model(bias=True).to(torch.bfloat16)
    with_rows(model, {"table": (7, 9), "head": (7, 9)})
    assert model(IDS).dtype == torch.bfloat16
    assert model(IDS).isfinite().all()


def test_rows_of_a_batch_have_their_own() -> None:
    model = Model()
    base = model(IDS)
    injection = with_rows(model, {"table": (7, 9), "head": (7, 9)})
    with torch.no_grad():
        with peftcore.route(model, ["lora", None]):
            routed = model(IDS)
        torch.testing.assert_close(routed[0], model(IDS)[0])
    torch.testing.assert_close(routed[1], base[1])
    assert not torch.allclose(routed[0], base[0])
    injection.remove()
    assert torch.equal(model(IDS), base)


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ({"nowhere": (7, 9)}, "rows of the token table 'nowhere'"),
        ({"": (7, 9)}, "which this model lacks"),
        (
            {"table": (7, 11)},
            r"table has 9 rows here but had 11 .* stores 4 of them: call model.resize_token_embeddings\(11\) first",
        ),
        ({"table": (9, 9)}, "table has 9 rows here"),
    ],
)
def test_tables_of_another_length_are_refused(rows: dict[str, tuple[int, int]], match: str) -> None:
    model = Model()
    with pytest.raises(HostMismatch, match=match):
        with_rows(model, rows)
    assert not peftcore.injections(model)
