"""Errors for what a user gave and cannot be used; the command line answers each with its sentence and exit code 2."""

from __future__ import annotations

from peftcore.errors import PeftcoreError


class BadInput(PeftcoreError, ValueError):
    """What the user gave cannot be used; the message says why and what to do."""


class MissingPackage(BadInput, ImportError):
    """Something to import is not installed; the message holds the pip line."""
