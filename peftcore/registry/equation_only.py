"""The notice, logged once, that a method is *equation only*: tested only against its equation. See `evidence`."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from peftcore.registry.evidence import sources

if TYPE_CHECKING:
    from peftcore.contract.method import Method

logger = logging.getLogger("peftcore")
told: set[str] = set()
"""Names of the methods for which this process has given the notice."""


def notice_equation_only(methods: Iterable[Method]) -> None:
    """Log one line, a warning of the logger "peftcore", for each method that was compared only with its equation; once
    per method in a process."""
    for method in methods:
        if not sources(type(method).__module__, method.name) and method.name not in told:
            told.add(method.name)
            logger.warning(
                "method %r is equation only: its tests compare it with its equation, not with numbers of another "
                "library or of the authors' code (to hide this line: logging.getLogger('peftcore').setLevel('ERROR'))",
                method.name,
            )
