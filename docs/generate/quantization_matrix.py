"""Writes both tables of quantization.md, what works with quantized models and every method on every packed base:
``make quantization-matrix`` (fifteen minutes).

Each cell is one run of `peftcore.testing.checks_packed.life`: evaluate, train, merge, save, load; nothing is written by
hand. How a method is tried stands in its test file, where the conformance kit is told of it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from peftcore.errors import PeftcoreError
from peftcore.registry.catalogue import methods
from peftcore.testing.checks_packed import HOSTS, Life, installed_schemes, life
from peftcore.testing.doors import Declared
from peftcore.testing.kit import Case, NotApplicable

ROOT = Path(__file__).parents[2]
HELPERS = [str(ROOT / "tests" / folder) for folder in ("kit", "side_by_side", "toys")]
PAGE = ROOT / "docs/quantization.md"
FORMS_BEGIN = "<!-- table of actions: written by docs/generate/quantization_matrix.py -->"
FORMS_END = "<!-- end of the table of actions -->"
BEGIN, END = "<!-- matrix: written by docs/generate/quantization_matrix.py -->", "<!-- end of the matrix -->"
SIGNS = {"yes": "●", "no, as on a dense base": "–", "nothing to train": "–", "acts on no packed weight": "–"}


def declared(name: str) -> Declared | None:
    """What the test file of a method tells the kit."""
    for path in ROOT.glob(f"plugins/*/tests/test_{name}.py"):
        sys.path[:0] = [each for each in (*HELPERS, str(path.parent)) if each not in sys.path]
        spec = importlib.util.spec_from_file_location(f"declared_{name}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found = (getattr(each, "declared", None) for each in vars(module).values())
        return next((each for each in found if isinstance(each, Declared) and each.method.name == name), None)
    return None


def case_of(name: str) -> Case | None:
    """The first of the kit's hosts of packed bases in which the method has a place."""
    told = declared(name)
    for host in HOSTS if told is None else (*(each for each in told.telling if each in HOSTS), *HOSTS):
        case = told.case(host) if told is not None else None
        if case is not None and case.inapplicable is None:
            return case
    return None


def cell(case: Case, scheme: str) -> str:
    """One run, as the table shows it: trains, merges, packs again. What is random in it does not hang on other runs."""
    torch.manual_seed(0)
    try:
        found = life(case, scheme)
    except NotApplicable:
        return ""
    except PeftcoreError as error:
        return f"refused: {type(error).__name__}"
    return " ".join(_sign(each) for each in _parts(found))


def _parts(found: Life) -> Iterable[str]:
    return found.trains, found.merges, found.repacks


def _sign(verdict: str) -> str:
    return SIGNS.get(verdict, "refused" if verdict.startswith("refused") else verdict)


def rows(names: Iterable[str], schemes: Iterable[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Methods and their cells by scheme; those that are tried on no host of packed bases are passed over."""
    for name in names:
        case = case_of(name)
        if case is not None:
            yield name, {scheme: cell(case, scheme) for scheme in schemes}


def table(found: Iterable[tuple[str, dict[str, str]]], schemes: list[str], corner: str = "method") -> str:
    """The matrix in Markdown."""
    lines = [f"| {corner} | " + " | ".join(schemes) + " |", "|---" * (len(schemes) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(cells[each] for each in schemes) + " |" for name, cells in found]
    return "\n".join(lines)


def lives(before: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[str, dict[str, str]]]:
    """Forms of quantized models, each with the version of its library and what every action comes to. Where the library
    is not installed, the row stays what it is."""
    sys.path[:0] = [each for each in HELPERS if each not in sys.path]
    forms, actions = importlib.import_module("packed_folders"), importlib.import_module("packed_lives")
    for name, form in forms.FORMS.items():
        if not form.installed:
            yield name, dict(before.get(name, {}))
            continue
        with tempfile.TemporaryDirectory() as place:
            folder = forms.write(name, Path(place, "model"))
            cells = {}
            for number, action in enumerate(actions.ACTIONS):
                cells[action] = actions.cell(name, action, folder, Path(place, str(number)))
        yield name, {"library": f"{form.distribution} {forms.version(form.distribution)}", **cells}


def written(page: str, begin: str = BEGIN, end: str = END) -> dict[str, dict[str, str]]:
    """The matrix that stands in the page."""
    lines = page[page.index(begin) + len(begin) : page.index(end)].strip().splitlines()
    split = [[each.strip() for each in line.strip("|").split("|")] for line in lines]
    return {name: dict(zip(split[0][1:], cells, strict=True)) for name, *cells in split[2:]}


def put(content: str, begin: str, end: str) -> None:
    """Write what stands between two marks of the page."""
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(f"{page[: page.index(begin)]}{begin}\n{content}\n{page[page.index(end) :]}", encoding="utf-8")


def main() -> None:
    """Run every cell and write the page anew."""
    had = written(PAGE.read_text(encoding="utf-8"), FORMS_BEGIN, FORMS_END)
    of_forms = list(lives(had))
    put(table(of_forms, list(of_forms[0][1]), "quantized by"), FORMS_BEGIN, FORMS_END)
    if sys.argv[1:] == ["actions"]:
        return
    schemes, names = sorted(installed_schemes()), [info.name for info in methods()]
    found: list[tuple[str, dict[str, Any]]] = []
    for name, cells in rows(names, schemes):
        print(name, *cells.values(), sep="  ", flush=True)
        found.append((name, cells))
    put(table(found, schemes), BEGIN, END)


if __name__ == "__main__":
    main()
