"""Errors for input of a user that cannot be used; the command line answers each with its sentence and exit code 2."""

from __future__ import annotations

from peftcore.errors import PeftcoreError


class BadInput(PeftcoreError, ValueError):
    """Raised where input of the user cannot be used; the message says why and what to do."""


class MissingPackage(BadInput, ImportError):
    """Raised where something to import is not installed; the message holds the pip line."""
