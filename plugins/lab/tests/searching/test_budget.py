"""Budgets as users write them."""

import pytest

from peftcore.errors import BadInput
from peftcore_lab.searching.budget import memory, values


@pytest.mark.parametrize(
    ("text", "count"), [("50k", 50_000), ("1.5M", 1_500_000), ("2_000", 2000), (30, 30), ("0.5%", 5), ("100 %", 1000)]
)
def test_budgets(text, count):
    assert values(text, 1000) == count


@pytest.mark.parametrize(("text", "count"), [("2GB", 2 * 10**9), ("1.5 MiB", 1572864), ("10b", 10)])
def test_sizes_of_memory(text, count):
    assert memory(text) == count


@pytest.mark.parametrize("text", ["much", "-5", "5 apples", ""])
def test_no_budgets(text):
    with pytest.raises(BadInput, match="write a number"):
        values(text, 1000)
    with pytest.raises(BadInput, match="write a size"):
        memory(text)
