"""The matrix in docs/quantization.md is what its script finds: some of its cells in a quick run, all in a whole one."""

import os
from pathlib import Path

import pytest

import peftcore
import quantization_matrix as matrix
from peftcore.testing.checks_packed import TELLING_SCHEMES, installed_schemes
from peftcore.testing.kit import ALL

DOCS = Path(__file__).parents[2] / "docs"
TELLING = ("lora", "dora", "oft", "bitfit", "fish_mask", "prefix_tuning", "qlora", "locon")
"""Methods of a quick run: an activation, a weight, a rotation, biases, masks, attention, a packed base, kernels."""


def test_every_method_and_every_scheme_is_in_the_matrix() -> None:
    """But for those that act on the sums of other methods, or are tried on none of these hosts, with a reason there."""
    written = matrix.written((DOCS / "quantization.md").read_text(encoding="utf-8"))
    assert all(set(cells) == set(installed_schemes()) for cells in written.values())
    missing = {info.name for info in peftcore.methods()} - set(written)
    assert not [name for name in missing if matrix.case_of(name) is not None]
    assert not [name for name, cells in written.items() for cell in cells.values() if cell.startswith("refused")]


def alike(scheme: str, one: str, other: str) -> bool:
    """The same verdicts; errors of packing again within a quarter, and of bitsandbytes' 4 bits of any size: its kernels
    lose more in matrices as small as these, on some processors."""
    *verdicts, error = one.split()
    *others, another = other.split()
    if verdicts != others or error == another or scheme in ("bnb-nf4", "bnb-fp4"):
        return verdicts == others
    return abs(float(error) - float(another)) <= 0.25 * float(another)


NAMES = [info.name for info in peftcore.methods()] if os.environ.get(ALL) == "1" else list(TELLING)


@pytest.mark.parametrize("name", NAMES)
def test_cells_are_found_again(name: str) -> None:
    written = matrix.written((DOCS / "quantization.md").read_text(encoding="utf-8"))
    schemes = installed_schemes() if os.environ.get(ALL) == "1" else list(TELLING_SCHEMES)
    for found, cells in matrix.rows([name], schemes):
        assert {key: cell for key, cell in cells.items() if not alike(key, cell, written[found][key])} == {}
