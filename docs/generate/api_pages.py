"""Reference pages: public names in the order of the alphabet, read from the sources by mkdocstrings."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence

import yaml

MODULES: Mapping[str, Sequence[str]] = {
    "peftcore": (),
    "peftcore.author": (
        "peftcore.author.essentials",
        "peftcore.author.weights",
        "peftcore.author.blocks",
        "peftcore.author.sequences",
    ),
    "peftcore.author.formats": (),
    "peftcore.training": (),
    "peftcore.testing": (),
    "peftcore.files.formats": ("peftcore.files.formats.format", "peftcore.files.formats.description"),
}
"""Packages, and the modules that say what is public where the package itself has no names."""


def pages() -> dict[str, str]:
    """A page for each package, by its address."""
    return {f"api/{name}.md": page(name, modules) for name, modules in MODULES.items()}


def page(name: str, modules: Sequence[str]) -> str:
    """The page of one package."""
    public = getattr(importlib.import_module(name), "__all__", ())
    options = {"members": list(public), "show_root_heading": False, "show_root_toc_entry": False, "heading_level": 2}
    parts = [f"# `{name}`", _block(name, options)]
    parts += [
        f"## `{module}`\n\n{_block(module, {'show_root_heading': False, 'heading_level': 3})}" for module in modules
    ]
    return "\n\n".join(parts) + "\n"


def _block(name: str, options: Mapping[str, object]) -> str:
    lines = yaml.safe_dump({"options": dict(options)}, sort_keys=False).splitlines()
    return "\n".join([f"::: {name}", *(f"    {line}" for line in lines)])
