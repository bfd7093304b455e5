"""The output of `peftcore methods`: a table of all methods, built from their tags and plans."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from rich.progress import track
from rich.table import Column, Table

from peftcore.errors import PeftcoreError
from peftcore.registry.catalogue import COMBINES, QUANTIZED, TRAINS, MethodInfo


def records(infos: Iterable[MethodInfo], sizes: bool) -> list[dict[str, Any]]:
    """Return one record for each method. If a method cannot be imported, its record has the error. With `sizes`, the
    trainable parameters of each method on the reference hosts are counted."""
    listed = list(infos)
    shown = track(listed, "planning", transient=True, disable=not sizes)
    return [_record(info, sizes) for info in shown]


def _record(info: MethodInfo, sizes: bool) -> dict[str, Any]:
    record: dict[str, Any] = {"name": info.name, "distribution": info.distribution}
    if info.preset is not None:
        record |= {"preset_of": info.preset.method, "preset": str(info.preset), "note": info.preset.note}
    try:
        record |= {
            "category": info.category,
            "kind": info.kind,
            "paper": info.paper,
            "mergeable": info.mergeable,
            "per_row": info.per_row,
            "needs_data": info.needs_data,
            "checked": info.checked,
            "checked_against": info.checked_against,
        }
        if sizes:
            workflow = info.preset is not None and info.preset.workflow
            record["parameters"] = {} if workflow else dict(info.budgets)
    except PeftcoreError as error:
        record["error"] = str(error)
    return record


def as_json(found: list[dict[str, Any]]) -> str:
    """Return the records as JSON, for scripts."""
    return json.dumps(found, indent=2)


def tally(found: list[dict[str, Any]]) -> str:
    """Return text with the number of methods of each kind and with each ability. Presets (names for options of a
    method) are not counted."""
    methods = [record for record in found if "error" not in record and "preset" not in record]
    kinds = Counter(record["kind"] for record in methods)
    merges, rows, data, checked = (
        sum(bool(record[key]) for record in methods) for key in ("mergeable", "per_row", "needs_data", "checked")
    )
    return (
        f"{len(methods)} methods: {kinds[TRAINS]} train parameters of their own, {kinds[COMBINES]} combine trained "
        f"adapters, {kinds[QUANTIZED]} are for quantized models. {merges} merge into the weights, {rows} take samples "
        f"of one batch by different adapters, {data} look at data first; {checked} are checked against other code."
    )


def as_table(found: list[dict[str, Any]], sizes: bool) -> Table:
    """Return the records as a table. The number of parameters is counted on the first reference host to which the
    method can be applied."""
    checked = Column("checked against", min_width=len("equation only"))
    table = Table("method", "category", "paper", "merges", "per sample", "data", checked)
    if sizes:
        table.add_column("parameters", justify="right")
        table.add_column("models")
    for record in sorted(found, key=lambda each: (each.get("category", ""), each["name"])):
        if "error" in record:
            table.add_row(record["name"], f"[red]{record['error']}")
            continue
        row = [record["name"], record["category"], record["paper"]]
        row += ["yes" if record[key] else "" for key in ("mergeable", "per_row", "needs_data")]
        row.append(
            f"= {record['preset_of']}" if "preset" in record else record["checked_against"] or "[dim]equation only"
        )
        if sizes:
            budgets: dict[str, int] = record["parameters"]
            first = next(iter(budgets), None)
            row += [f"{budgets[first]:,} ({first})" if first else "by its options", ", ".join(budgets)]
        table.add_row(*row)
    return table
