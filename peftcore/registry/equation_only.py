"""Logs a warning, once, for methods that are *equation only*: their tests compare them only with their equation. See
`evidence`."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from peftcore.registry.evidence import sources

if TYPE_CHECKING:
    from peftcore.contract.method import Method

logger = logging.getLogger("peftcore")
told: set[str] = set()
"""Names of the methods for which this process has logged the warning."""


def notice_equation_only(methods: Iterable[Method]) -> None:
    """Log a warning, by the logger "peftcore", for each method whose tests compare it only with its equation. It is
    logged once per method and process."""
    for method in methods:
        if not sources(type(method).__module__, method.name) and method.name not in told:
            told.add(method.name)
            logger.warning(
                "method %r is equation only: its tests compare it with its equation, not with numbers of another "
                "library or of the authors' code (to hide this line: logging.getLogger('peftcore').setLevel('ERROR'))",
                method.name,
            )
