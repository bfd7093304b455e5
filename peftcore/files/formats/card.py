"""The model card of a saved adapter: base, method, budget, how to load it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peftcore.files.envelope import base_name
from peftcore.injection.injection import Injection
from peftcore.layers.layer import plain_class
from peftcore.surgery.planning import size_of

CARD = "README.md"
MARK = "<!-- written by peftcore; remove this line to keep your own text -->"


def is_ours(path: Path) -> bool:
    """Whether a card may be written: there is none, or it is one that the user has not taken over."""
    return not path.exists() or (path.is_file() and MARK in path.read_text(encoding="utf-8", errors="replace"))


def card(injection: Injection, formats: Sequence[str]) -> str:
    """Returns the card as Markdown with the front matter that model hubs read."""
    method, base = injection.method, base_name(injection.model)
    paper = method.tags.paper
    options = injection.config.model_dump(mode="json", exclude={"method"}, exclude_defaults=True)
    shown = ", ".join(f"`{key}={value!r}`" for key, value in options.items()) or "all as by default"
    values = sum(parameter.numel() for parameter in injection.parameters())
    host = size_of(injection.base_modules())
    lines = ["---", f"library_name: {'peft' if 'peft' in formats else 'peftcore'}"]
    lines += [f"base_model: {base}"] if base else []
    lines += ["tags:", "- peft", f"- {method.name}", "---", "", MARK, "", f"# {method.name}", ""]
    source = f"[{paper}](https://arxiv.org/abs/{paper})" if paper[:4].isdecimal() else paper
    lines += [
        f"An adapter for {f'`{base}`' if base else f'a `{plain_class(injection.model).__name__}`'}.",
        "",
        f"- method: {method.name} ({source}), options: {shown}",
        f"- sites: {len(injection.grafts)}",
        f"- budget: {values:,} values, {values / max(host, 1):.3%} of the base's {host:,}",
        "",
        "```python",
        "import peftcore",
        "",
        'injection = peftcore.load(model, "path of this folder")',
        "```",
        "",
    ]
    return "\n".join(lines)
