"""``python -m benchmarks --threads 1``: a table, ``benchmarks/results-1.json`` and ``benchmarks/scaling.png``."""

from __future__ import annotations

import argparse
import functools
import json
import platform
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import experts, lifecycle, packed, page, scaling, serving, steps, transposed
from benchmarks.contenders import PAIRS
from benchmarks.memory import keep_memory
from benchmarks.rows import Row
from benchmarks.timing import Estimate

HERE = Path(__file__).parent
FIGURES: Mapping[str, Callable[[int], Iterator[list[Row]]]] = {
    "import": lifecycle.importing,
    "injection": lifecycle.injecting,
    "around": lifecycle.around,
    "token": serving.one_token,
    "rows": serving.mixed_rows,
    "steps": steps.step_rows,
    "variants": steps.variant_rows,
    "transposed": transposed.transposed_rows,
    "packed": packed.packed_rows,
    "experts": experts.expert_rows,
}


def table(rows: list[Row]) -> Table:
    """Return a table of one row a figure; what is not reached is marked."""
    found = Table("figure", "peftcore", "peft", "ratio (95 %)", "wanted", "", box=None, pad_edge=False)
    for row in rows:
        mark = "" if row.reached else "not reached"
        found.add_row(row.figure, row.ours, row.theirs, str(row.ratio), row.goal, mark)
    return found


def among_others(
    rows: list[Row], growth: list[scaling.Growth], last: Mapping[str, Any]
) -> tuple[list[Row], list[scaling.Growth]]:
    """Put the new measurements in the places that they have among the figures of the last run; what is new, behind what
    was measured before it."""
    found = {row["figure"]: Row(**{**row, "ratio": Estimate(**row["ratio"])}) for row in last["rows"]}
    names = list(found)
    for row, before in zip(rows, [None, *rows], strict=False):
        if row.figure not in found:
            names.insert(names.index(before.figure) + 1 if before is not None else 0, row.figure)
        found[row.figure] = row
    kept = [scaling.Growth(**{**each, "sizes": tuple(each["sizes"])}) for each in last["growth"]]
    return [found[name] for name in names], growth or kept


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("figures", nargs="*", help=f"of {', '.join((*FIGURES, 'scaling'))}; all when left out")
    parser.add_argument("--rounds", type=int, default=20, help="how often each contender runs")
    parser.add_argument("--threads", type=int, default=1, help="the page has figures with one")
    parser.add_argument("--out", type=Path, help="a folder; left out, this one, and only if all figures are measured")
    parser.add_argument(
        "--page", action="store_true", help="put the tables into docs/performance.md; some figures replace those there"
    )
    parser.add_argument("--methods", nargs="+", choices=PAIRS, default=[*PAIRS], help="whose steps are measured")
    given = parser.parse_args()
    figures: dict[str, Callable[[int], Iterator[list[Row]]]] = {**FIGURES}
    figures["steps"] = functools.partial(steps.step_rows, methods=given.methods)
    chosen = given.figures or [*FIGURES, "scaling"]
    if unknown := set(chosen).difference(FIGURES, ["scaling"]):
        parser.error(f"no figures are called {', '.join(sorted(unknown))}")
    if given.page and given.threads != 1:
        parser.error("the page has figures with one thread; --out takes a folder for others")
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)  # before the half hour, not behind it
    torch.set_num_threads(given.threads)
    keep_memory()
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    growth: list[scaling.Growth] = []
    console = Console()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for name in progress.track(chosen):
            if name == "scaling":
                for each in progress.track(scaling.all_growth(), total=3, description=name):
                    growth.append(each)
                continue
            for found in figures[name](given.rounds):
                rows += found
                progress.console.print(table(found))
    console.print(table(rows))
    for each in growth:
        steepest = ", ".join(f"{name} {exponent:.2f}" for name, exponent in each.exponents().items())
        console.print(f"{each.title}, steepest growth over {each.over} (1 is linear): {steepest}")
    circumstances = {
        "machine": f"{platform.machine()}, {given.threads} threads",
        "rounds": str(given.rounds),
        **{name: version(name) for name in ("torch", "transformers", "peft", "peftcore")},
    }
    out = given.out or (HERE if given.page or not given.figures else None)
    if out is None:
        return
    results = f"results-{given.threads}.json"
    if given.figures and given.page:
        last = json.loads((HERE / results).read_text(encoding="utf-8"))
        rows, growth = among_others(rows, growth, last)
        circumstances["rounds"] = last["rounds"]  # of nearly all
    document = {
        **circumstances,
        "rows": [asdict(row) for row in rows],
        "growth": [asdict(each) for each in growth],
    }
    if "scaling" in chosen and given.threads == 1:
        scaling.draw(growth, out / "scaling.png")
    if given.page:
        page.write("python -m benchmarks --threads 1 --page", page.figures(rows, circumstances), page.growths(growth))
    (out / results).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
