"""The output of the commands on adapter files, as tables and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from peftcore.cli.adapters.results import Converted, Exported, ForReader, MergedAdapter, shown_format
from peftcore.cli.app import printable
from peftcore.errors import shown
from peftcore.files.formats.description import Description
from peftcore.files.formats.file_options import OFF
from peftcore.files.readers.check import ReaderReport
from peftcore.files.readers.reader import Verdict

MOST = 20
"""The number of rows of a long table that are shown; JSON has all rows."""


def plain(value: object, most: int = 200) -> Text:
    """Return a value as unformatted text: markup and control characters in it have no effect. Very long texts are
    cut."""
    text = str(value)
    return Text(printable(text if len(text) <= most else f"{text[:most]}..."))


def as_json(data: Any) -> str:
    return json.dumps(data, indent=2, default=str)


def description_data(about: Description) -> dict[str, Any]:
    """Return all known facts about a file, as JSON values."""
    return {
        "format": shown_format(about.format),
        "methods": about.methods,
        "kind": about.kind,
        "options": dict(about.options),
        "base": about.base,
        "host": about.host or about.task,
        "parts": about.parts,
        "sites": about.sites,
        "trained_along": {path: list(shape) for path, shape in about.trained.items()},
        "values": about.values,
        "bytes": about.bytes,
        "files": [{"path": str(file.path), "bytes": file.path.stat().st_size} for file in about.files],
        "tensors": [
            {"name": name, "shape": list(shape), "dtype": _dtype(file.dtypes[name])}
            for file in about.files
            for name, shape in file.shapes.items()
        ],
        "problem": about.problem,
    }


def show_description(about: Description, console: Console) -> None:
    data = description_data(about)
    facts = {
        "format": data["format"],
        "method": _method(about),
        "options": ", ".join(f"{key}={shown(value)}" for key, value in about.options.items() if value not in OFF),
        "base model": about.base or "the file does not say",
        "made on": data["host"],
        "parts": ", ".join(about.parts),
        "target modules": _sites(about.sites),
        "trained along": ", ".join(about.trained),
        "parameters": f"{about.values:,} in {len(data['tensors']):,} tensors, {decimal(about.bytes)}",
        "files": ", ".join(f"{file['path']} ({decimal(file['bytes'])})" for file in data["files"]),
        "problem": about.problem,
    }
    console.print(_facts(facts))
    rows = [(each["name"], " x ".join(map(str, each["shape"])) or "scalar", each["dtype"]) for each in data["tensors"]]
    _show_rows(console, ("tensor", "shape", "dtype"), rows)


def merged_data(model: str, out: Path, merged: Sequence[MergedAdapter]) -> dict[str, Any]:
    """Return the results of a merge, as JSON values."""
    adapters = [
        {
            "adapter": each.adapter,
            "method": each.method,
            "weight": each.weight,
            "sites": each.sites,
            "tensors": each.report.tensors,
            "dense": list(each.report.dense),
            "repacked": {path: asdict(error) for path, error in each.report.repacked.items()},
        }
        for each in merged
    ]
    return {"model": model, "out": str(out), "adapters": adapters}


def show_merged(out: Path, merged: Sequence[MergedAdapter], console: Console) -> None:
    rows = [
        (each.adapter, each.method, f"{each.weight:g}", f"{each.sites:,}", f"{each.report.tensors:,}",
         f"{len(each.report.dense):,}")
        for each in merged
    ]  # fmt: skip
    _show_rows(console, ("adapter", "method", "weight", "target modules", "tensors written", "dequantized"), rows)
    errors = [
        (path, f"{error.error:.3g}", f"{error.lost:.3g}")
        for each in merged
        for path, error in sorted(each.report.repacked.items(), key=lambda item: -item[1].error)
    ]
    if errors:
        _show_rows(console, ("quantized again", "error", "of the update"), errors)
    console.print(plain(f"merged model: {out}"))


def converted_data(done: Converted) -> dict[str, Any]:
    """Return the results of a conversion, as JSON values."""
    return {
        "adapter": done.adapter,
        "from": done.was,
        "to": done.now,
        "method": done.method,
        "sites": done.sites,
        "values": done.values,
        "model": str(done.model),
        "weights_loaded": done.weights,
        "files": list(done.files),
    }


def show_converted(done: Converted, console: Console) -> None:
    facts = {
        "adapter": f"{done.method}, {done.sites:,} target modules, {done.values:,} parameters",
        "from": done.was,
        "to": done.now,
        "model": f"{done.model} ({'its weights were loaded' if done.weights else 'its weights were not needed'})",
        "files": ", ".join(done.files),
    }
    console.print(_facts(facts))


def exported_data(done: Exported) -> dict[str, Any]:
    """Return the results of an export as a LoRA, with its errors, as JSON values."""
    return {
        "adapter": done.adapter,
        "method": done.method,
        "rank": done.rank,
        "format": done.format,
        "values": done.values,
        "largest_error": max(done.errors.values()),
        "errors": done.errors,
        "files": list(done.files),
    }


def show_exported(done: Exported, console: Console) -> None:
    worst = sorted(done.errors.items(), key=lambda item: -item[1])
    _show_rows(console, ("target module", "error"), [(path, f"{error:.3g}") for path, error in worst])
    facts = {
        "lora": f"rank {done.rank} of {done.method}, {len(done.errors):,} target modules, {done.values:,} parameters",
        "largest error": f"{worst[0][1]:.3g} of the update",
        "files": ", ".join(done.files),
    }
    console.print(_facts(facts))


def report_data(report: ReaderReport) -> dict[str, Any]:
    """Return the report on how a program reads a file, as JSON values."""
    reader = report.reader
    return {
        "for": reader.name,
        "version": reader.version,
        "rules": {"source": reader.source, "files": list(reader.files)},
        "format": shown_format(report.format),
        "verdict": report.verdict.value,
        "as_trained": report.as_trained,
        "needs": report.needs,
        "parts": [
            {"part": row.what, "verdict": row.verdict.value, "why": row.why, "tensors": list(row.tensors)}
            for row in report.rows
        ],
        "notes": list(reader.notes),
    }


def show_report(report: ReaderReport, console: Console) -> None:
    order = list(Verdict)
    rows = sorted(report.rows, key=lambda row: -order.index(row.verdict))
    _show_rows(console, ("part", "verdict", "why"), [(row.what, row.verdict.value, row.why) for row in rows])
    reader = report.reader
    said = "as it was trained" if report.as_trained else f"not as it was trained: the worst is {report.verdict.value}"
    facts = {
        "read": f"{said}, by {reader.name} {reader.version}",
        "needs": report.needs,
        "the rules": f"of {reader.source}: {', '.join(reader.files)}",
        **{f"note {number}": note for number, note in enumerate(reader.notes, 1)},
    }
    console.print(_facts(facts))


def export_data(done: ForReader) -> dict[str, Any]:
    """Return the results of an export for a program, as JSON values."""
    return {
        "adapter": done.adapter,
        "method": done.method,
        "how": done.done.how,
        "rank": done.done.rank,
        "largest_error": done.done.error,
        "errors": done.done.errors,
        "filled": list(done.done.filled),
        "files": list(done.files),
        "read": report_data(done.done.report),
    }


def show_export(done: ForReader, console: Console) -> None:
    written, report = done.done, done.done.report
    if written.how == "projected":
        worst = sorted(written.errors.items(), key=lambda item: -item[1])
        _show_rows(console, ("target module", "error"), [(path, f"{error:.3g}") for path, error in worst])
    what = {
        "as it is": f"{done.method}, as it is",
        "as a LoRA": f"a LoRA of rank {written.rank} that computes what {done.method} does",
        "projected": f"the nearest LoRA of rank {written.rank} to what {done.method} does, which loses up to "
        f"{written.error:.3g} of it",
    }[written.how]
    facts = {
        "written": f"{what}, for {report.reader.name} {report.reader.version}",
        "filled": _filled(written.filled),
        "needs": report.needs,
        "files": ", ".join(done.files),
        **{f"note {number}": note for number, note in enumerate(report.reader.notes, 1)},
    }
    console.print(_facts(facts))


def _filled(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - 2:,} more" if len(paths) > 2 else ""
    return f"{', '.join(paths[:2])}{more}, by an update of zero, beside which the others are read" if paths else ""


def _method(about: Description) -> str:
    ours = ", ".join(about.methods)
    if not about.kind:
        return ours
    return f"{ours} ({about.format}: {about.kind})" if ours else f"{about.kind} of {about.format}"


def _sites(sites: Sequence[str]) -> str:
    if not sites:
        return "the method finds them"
    more = f", and {len(sites) - 4:,} more" if len(sites) > 4 else ""
    return f"{len(sites):,}: {', '.join(sites[:4])}{more}"


def _dtype(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _facts(facts: Mapping[str, str]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for name, value in facts.items():
        if value:
            table.add_row(Text(name, style="bold"), plain(value, 1000))
    return table


def _show_rows(console: Console, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    rows = list(rows)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, head in enumerate(heads):
        table.add_column(head, justify="right" if index else "left", overflow="fold")
    for row in rows[:MOST]:
        table.add_row(*map(plain, row))
    console.print(table)
    if len(rows) > MOST:
        console.print(f"and {len(rows) - MOST:,} more; --json lists all", style="dim")
