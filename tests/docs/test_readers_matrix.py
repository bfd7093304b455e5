"""The table in docs/readers.md of what other programs read is what its script finds, and no cell of it is silent."""

import re
import sys

import pytest

pytest.importorskip("peft")
pytest.importorskip("diffusers")

import peftcore
import readers_matrix as matrix
from peftcore.files.readers.reader import readers

WRITTEN = matrix.written(matrix.PAGE.read_text(encoding="utf-8"), matrix.BEGIN, matrix.END)
WORDS = {"as it is", "as a LoRA", "refused", matrix.NO_PLACE, matrix.NO_EFFECT}
ERROR = re.compile(r"0\.\d+|[1-9]e-\d+")
TELLING = ("vera", "dora", "prompt_tuning")


def test_every_method_has_a_row_and_every_program_a_column() -> None:
    known = [info.name for info in peftcore.methods(presets=False)]
    assert [name.strip("`") for name in WRITTEN] == known, "python docs/generate/readers_matrix.py --missing"
    assert set(matrix.COLUMNS) == set(readers())


def test_the_table_of_the_rules_is_that_of_the_rules() -> None:
    assert f"{matrix.RULES_BEGIN}\n{matrix.rules()}\n{matrix.RULES_END}" in matrix.PAGE.read_text(encoding="utf-8")


def test_no_cell_is_silent_and_nothing_that_was_written_differs() -> None:
    for name, cells in WRITTEN.items():
        assert list(cells) == list(matrix.COLUMNS)
        for column, cell in cells.items():
            assert cell in WORDS or ERROR.fullmatch(cell) or cell == f"refused by {column}", (name, column, cell)


@pytest.mark.parametrize("name", TELLING)
def test_rows_are_found_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*matrix.HELPERS, *sys.path])
    cells, reasons = matrix.tried(name)
    assert cells == WRITTEN[f"`{name}`"]
    for column, cell in cells.items():
        assert (cell == "refused") == (column in reasons)
