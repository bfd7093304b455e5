"""What the command line answers to bad input: one sentence and exit code 2, never a traceback."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from peftcore.errors import PeftcoreError


class BadInput(PeftcoreError, ValueError):
    """What the user gave cannot be used; the message says why and what to do."""


class MissingPackage(BadInput, ImportError):
    """Something to import is not installed; the message holds the pip line."""


def require(packages: Mapping[str, str], options: str = "") -> None:
    """Raise `MissingPackage` unless every module is there.

    Arguments:
      packages: import name -> what pip has to install for it.
      options: what the pip line says before that.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        requirements = sorted({f"'{packages[name]}'" for name in missing})
        line = " ".join(["pip install", *options.split(), *requirements])
        raise MissingPackage(f"not installed: {', '.join(missing)}. Run: {line}")
