"""Finds installed Python packages and their folders without importing them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from peftcore.errors import MissingPackage

PACKAGE = "package:"
"""The prefix for the name of an installed package, in arguments that otherwise accept a folder."""
LAB = "peftcore-lab"
"""The name of the distribution with the commands that train, compare and search."""


def package_folder(name: str) -> Path | None:
    """Return the folder of an installed package without importing it. Returns None for names with a dot, since Python
    would import the package before the dot."""
    try:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
    except ValueError:  # imported already, by no file: __main__
        return None
    found = None if spec is None else spec.submodule_search_locations
    return Path(found[0]) if found else None


def require(packages: Mapping[str, str], options: str = "") -> None:
    """Raise an error if one of the packages is not installed.

    Args:
        packages: the requirement that pip has to install for each package, by the package's import name.
        options: options of pip in the suggested command, in front of the requirements.

    Raises:
        MissingPackage: a package is not installed; the message has the command that installs it.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        requirements = sorted({f"'{packages[name]}'" for name in missing})
        line = " ".join(["pip install", *options.split(), *requirements])
        raise MissingPackage(f"not installed: {', '.join(missing)}. Run: {line}")


def has_lab() -> bool:
    """Return True if the package of peftcore-lab can be imported."""
    return importlib.util.find_spec("peftcore_lab") is not None


def lab_is_missing(what: str) -> MissingPackage:
    """Return the error to raise if `what`, a function or command of peftcore-lab, is not available."""
    if has_lab():
        return MissingPackage(f"{what} is part of {LAB}, whose plugin was not loaded: run peftcore doctor")
    return MissingPackage(f"{what} is part of {LAB}, which is not installed. Run: pip install {LAB}")
