"""The model card of a saved adapter: base, task, method, budget, metrics, how to load it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftcore.errors import ExportError, shown
from peftcore.files.auto_classes import task_of
from peftcore.files.envelope import base_name
from peftcore.injection.injection import Injection
from peftcore.layers.layer import plain_class
from peftcore.surgery.planning import size_of

CARD = "README.md"
MARK = "<!-- written by peftcore; remove this line to keep your own text -->"
NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
"""Names of models on the hub, "owner/name"; the oldest ones have no owner."""
Metrics = Mapping[str, Any]
"""Numbers by name, or by data set and name."""
SOME, OTHER = "unknown", "other"
"""Placeholders for a data set and a task that the user did not name, since the model index requires both."""


def is_ours(path: Path) -> bool:
    """True if peftcore may write the card: the folder has no card, or its card still contains `MARK`."""
    return not path.exists() or (path.is_file() and MARK in path.read_text(encoding="utf-8", errors="replace"))


def card(injection: Injection, formats: Sequence[str], metrics: Metrics | None = None) -> str:
    """Returns the card as Markdown with the front matter that model hubs read.

    Raises:
        ExportError: metrics are not a mapping from names to numbers.
    """
    method, base, task = injection.method, base_name(injection.model), task_of(injection.model)
    paper = method.tags.paper
    options = injection.config.model_dump(mode="json", exclude={"method"}, exclude_defaults=True)
    shown_options = ", ".join(f"`{key}={value!r}`" for key, value in options.items()) or "all as by default"
    values = sum(parameter.numel() for parameter in injection.parameters())
    host = size_of(injection.base_modules())
    rows = metric_rows(metrics or {})
    lines = ["---", f"library_name: {'peft' if 'peft' in formats else 'peftcore'}"]
    lines += [f"base_model: {base}", "base_model_relation: adapter"] if base and _is_of_a_hub(base) else []
    lines += [f"pipeline_tag: {task}"] if task else []
    lines += ["tags:", "- peft", f"- {method.name}"]
    lines += _index(injection.name, task or OTHER, rows) if rows else []
    lines += ["---", "", MARK, "", f"# {method.name}", ""]
    source = f"[{paper}](https://arxiv.org/abs/{paper})" if paper[:4].isdecimal() else paper
    lines += [
        f"An adapter for {f'`{base}`' if base else f'a `{plain_class(injection.model).__name__}`'}.",
        "",
        f"- method: {method.name} ({source}), options: {shown_options}",
        f"- sites: {len(injection.grafts)}",
        f"- size: {values:,} values, {values / max(host, 1):.3%} of the base's {host:,}",
        *(f"- {name}{f' on {data}' if data != SOME else ''}: {value:g}" for data, name, value in rows),
        "",
        "```python",
        "import peftcore",
        "",
        'injection = peftcore.load(model, "path of this folder")',
        "```",
        "",
    ]
    return "\n".join(lines)


def _is_of_a_hub(base: str) -> bool:
    """Whether a base's name is a repository on a hub and not a local folder. Hubs refuse cards with other names."""
    return NAME.fullmatch(base) is not None and not Path(base).exists()


def metric_rows(metrics: Metrics) -> list[tuple[str, str, float]]:
    """Returns the data set, the name and the value of each metric.

    Raises:
        ExportError: metrics are not a mapping from names to numbers.
    """
    rows = []
    for key, value in metrics.items():
        several = isinstance(value, Mapping)
        for name, number in value.items() if several else [(key, value)]:
            data = key if several else SOME
            try:
                found = math.nan if isinstance(number, (str, bool)) else float(number)
            except (TypeError, ValueError, RuntimeError, OverflowError):
                found = math.nan
            text = all(isinstance(each, str) and each.isprintable() and each for each in (data, name))
            if not text or not math.isfinite(found):
                wrong = f"metric {shown(name)}={shown(number)} is not a finite number with a name"
                raise ExportError(f'{wrong}; write metrics={{"accuracy": 0.93}}')
            rows.append((data, name, found))
    return rows


def _index(title: str, task: str, rows: Sequence[tuple[str, str, float]]) -> list[str]:
    """Returns the lines of a card's model index, from which hubs show results. Strings are written as JSON, which is
    valid YAML."""
    lines = ["model-index:", f"- name: {json.dumps(title)}", "  results:"]
    for data in dict.fromkeys(data for data, _, _ in rows):
        lines += ["  - task:", f"      type: {task}", "    dataset:"]
        lines += [f"      name: {json.dumps(data)}", f"      type: {json.dumps(data)}", "    metrics:"]
        for of, name, value in rows:
            if of == data:
                lines += [f"    - type: {json.dumps(name)}", f"      value: {_number(value)}"]
    return lines


def _number(value: float) -> str:
    """Returns a number as text that YAML 1.1 reads as a number: with a dot before the exponent."""
    mantissa, exponent, power = repr(value).partition("e")
    return f"{mantissa if '.' in mantissa else f'{mantissa}.0'}{exponent}{power}"
