"""The table in docs/files.md of what reads what of Flux, Wan and Qwen-Image is what its script finds: one row in a
quick run, all in a whole."""

import os

import pytest

pytest.importorskip("diffusers")

import original_files_matrix as matrix
from peftcore.testing.kit import ALL

WRITTEN = matrix.written(matrix.PAGE.read_text(encoding="utf-8"), matrix.BEGIN, matrix.END)
TELLING = ("Flux, another rank and scale of v",)
VERDICTS = {"equal", "refused", "refused by diffusers", "none"}


def test_every_form_is_equal_or_refused() -> None:
    """But for the magnitudes of DoRA, which diffusers leaves out and says so."""
    assert list(WRITTEN) == list(matrix.FORMS)
    for name, cells in WRITTEN.items():
        assert list(cells) == list(matrix.COLUMNS)
        for column, cell in cells.items():
            lost = "`dora`" in name and column.endswith("diffusers") and cell.startswith("differs by")
            assert cell in VERDICTS or lost, (name, column)
            if matrix.FORMS[name].theirs:
                assert cell == "equal", (name, column)


@pytest.mark.parametrize("name", matrix.FORMS if os.environ.get(ALL) == "1" else TELLING)
def test_rows_are_found_again(name: str) -> None:
    cells, reasons = matrix.tried(name)
    assert cells == WRITTEN[name]
    assert not any(cell.startswith("refused") for cell in cells.values()) or reasons
