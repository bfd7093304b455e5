"""Old names, which go on to work for one minor version and say what they are called now."""

from __future__ import annotations

import warnings


def renamed(old: str, new: str, stacklevel: int = 3) -> None:
    """Warn whoever used an old name; `stacklevel` counts the calls up to them from here, as `warnings.warn` does."""
    message = f"{old} is called {new} now; the old name goes with the next minor version"
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)
