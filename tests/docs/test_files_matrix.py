"""The table in docs/files.md of what reads what is what its script finds: some rows in a quick run, all in a whole."""

import gc
import os

import pytest

pytest.importorskip("lycoris")
pytest.importorskip("diffusers")

import files_matrix as matrix
from peftcore.testing.kit import ALL

WRITTEN = matrix.written(matrix.PAGE.read_text(encoding="utf-8"), matrix.BEGIN, matrix.END)
TELLING = ("`oft`, outputs, `rescaled`", "`tlora` from the principal part", "`dylora`")
LOST = ("`dora`", "ours for kohya: diffusers")
"""The one cell in which something else comes out: diffusers leaves magnitudes out, and says so."""
VERDICTS = {"equal", "equal, in its network", "refused", "refused by diffusers", "none"}


def test_every_form_is_equal_or_refused() -> None:
    assert list(WRITTEN) == list(matrix.FORMS)
    for name, cells in WRITTEN.items():
        assert list(cells) == list(matrix.COLUMNS)
        for column, cell in cells.items():
            assert cell in VERDICTS or ((name, column) == LOST and cell.startswith("differs by")), (name, column)
        assert cells["LyCORIS's file: peftcore"] in ("equal", "none")


@pytest.mark.parametrize("name", matrix.FORMS if os.environ.get(ALL) == "1" else TELLING)
def test_rows_are_found_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "collect", lambda: 0)  # which LyCORIS does for each module: in a whole run, 20 seconds
    cells, reasons = matrix.tried(name)
    assert cells == WRITTEN[name]
    for column, cell in cells.items():
        if cell.startswith("refused"):
            format, _, _ = matrix.COLUMNS[column].partition("_")
            assert reasons["diffusers" if cell == "refused by diffusers" else format]
