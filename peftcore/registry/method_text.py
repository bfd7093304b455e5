"""Splits the description of a method, the docstring of its module, at its four headings."""

from __future__ import annotations

import inspect

from peftcore.contract.method import Method

HEADINGS = ("Equation", "Start", "Differs from the authors' code", "Use it")
"""The headings in a method's docstring, in their order. A heading begins a line and ends with a colon; its text follows
on the same line or below."""


def text_of(cls: type[Method]) -> str:
    """Returns the docstring of a method's module, or of its class if the module does not have one."""
    module = inspect.getmodule(cls)
    return inspect.cleandoc((module and module.__doc__) or cls.__doc__ or "")


def sections(text: str) -> dict[str, str]:
    """Returns the parts of a description by heading, in the order of the text. The part before the first heading has
    the key ``""``."""
    found: dict[str, list[str]] = {"": []}
    lines = found[""]
    for line in text.splitlines():
        heading = next((each for each in HEADINGS if line.startswith(f"{each}:")), None)
        if heading is not None:
            lines, line = found.setdefault(heading, []), line.removeprefix(f"{heading}:").lstrip()
        lines.append(line)
    return {heading: "\n".join(lines).strip("\n") for heading, lines in found.items()}
