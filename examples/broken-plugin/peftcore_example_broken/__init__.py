"""Fails at import: the package below is installed nowhere."""

from collections.abc import Mapping

import a_dependency_that_was_never_declared  # noqa: F401

from peftcore.author import hookimpl

PEFTCORE_API = 2


@hookimpl
def peftcore_methods() -> Mapping[str, str]:
    """Never reached."""
    return {"never_seen": "peftcore_example_broken.never:Never"}
