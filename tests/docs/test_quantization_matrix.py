"""The matrix in docs/quantization.md is what its script finds: some of its cells in a quick run, all in a whole one. So
is the table of what works with quantized models, each cell a run."""

import functools
import os
from collections.abc import Callable
from pathlib import Path

import packed_folders
import packed_lives
import pytest
from slowly import quick

import peftcore
import quantization_matrix as matrix
from peftcore.registry.plugins import registry
from peftcore.testing.checks_packed import TELLING_SCHEMES, installed_schemes
from peftcore.testing.kit import ALL

DOCS = Path(__file__).parents[2] / "docs"
BACKENDS = {"gptqmodel": "gptqmodel", "optimum-quanto": "quanto", "compressed-tensors": "compressed_tensors"}
"""The entry points of formats that are only read, by distribution."""
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


@pytest.mark.share(3)
@pytest.mark.parametrize("name", NAMES)
def test_cells_are_found_again(name: str) -> None:
    written = matrix.written((DOCS / "quantization.md").read_text(encoding="utf-8"))
    schemes = installed_schemes() if os.environ.get(ALL) == "1" else list(TELLING_SCHEMES)
    for found, cells in matrix.rows([name], schemes):
        assert {key: cell for key, cell in cells.items() if not alike(key, cell, written[found][key])} == {}


PAGE = (DOCS / "quantization.md").read_text(encoding="utf-8")
ACTIONS = matrix.written(PAGE, matrix.FORMS_BEGIN, matrix.FORMS_END)
"""The table of what works with quantized models, as it stands in the page."""
CELLS = [(name, action) for name, cells in ACTIONS.items() for action in cells if action != "library"]
AT_ONCE = ("bitsandbytes nf4", "torchao int8", "torchao int8, inputs too", "GPTQ", "float8 of transformers")
LONG = ("`peftcore train`, `--resume`", "`Trainer`")
QUICK = [cell for cell in CELLS if cell[0] in AT_ONCE and cell[1] not in LONG]


def test_every_form_and_every_action_is_in_the_table() -> None:
    assert list(ACTIONS) == list(packed_folders.FORMS)
    assert all(list(cells) == ["library", *packed_lives.ACTIONS] for cells in ACTIONS.values())
    assert {"GPTQ", "AWQ"} <= set(ACTIONS)
    assert all(
        cells["library"].split()[0] == packed_folders.FORMS[name].distribution for name, cells in ACTIONS.items()
    )


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of quantized models, each written once."""
    return functools.cache(lambda name: packed_folders.write(name, tmp_path_factory.mktemp("model")))


@pytest.mark.share(3)
@pytest.mark.parametrize(("name", "action"), quick(CELLS, QUICK))
def test_what_works_with_a_quantized_model(
    name: str, action: str, packed_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    form = packed_folders.FORMS[name]
    if not form.installed:
        pytest.skip(f"{form.distribution} is not installed")
    if form.distribution in BACKENDS and BACKENDS[form.distribution] not in registry().plugins:
        pytest.skip("the entry points that are installed are of before: pip install -e plugins/quantized")
    assert packed_lives.cell(name, action, packed_folder(name), tmp_path) == ACTIONS[name][action]
