"""Logs single lines for the user as warnings of the logger "peftcore". Each line is logged only once in a process."""

from __future__ import annotations

import logging
from collections.abc import Iterable

logger = logging.getLogger("peftcore")
told: set[str] = set()
"""The lines that this process has logged already."""


def notice(lines: Iterable[str]) -> None:
    """Log the lines that this process has not logged yet."""
    for line in lines:
        if line not in told and logger.isEnabledFor(logging.WARNING):
            told.add(line)
            logger.warning("%s", line)
