"""The error that a failed check raises. Its message says what the author of the method can do."""

from __future__ import annotations

import inspect
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peftcore.testing.kit import Check, Expecting


class CheckFailed(AssertionError):
    """Raised if a check fails: a promise that methods must keep does not hold."""


def explained(check: Check, case: Expecting, error: Exception) -> str:
    """Return the error message of a failed check. It contains the check and the case, what was found, the usual cause,
    the remedy, and a command that runs only this check.

    Args:
        check: the check that failed.
        case: the case on which the check ran.
        error: the `CheckFailed` that the check raised, or any other error that was raised while it ran.
    """
    what, remedy = str(error), check.remedy
    if not isinstance(error, CheckFailed):
        what = f"{type(error).__name__}: {error}"
        place = _raised_in(case.subject, error)
        if place:
            what, remedy = f"{what} ({place})", f"look at that line first; else {remedy}"
    code = inspect.unwrap(check.function).__code__
    source = f"peftcore/testing/{Path(code.co_filename).name}, line {code.co_firstlineno}"
    return "\n".join(
        [
            f"{case.label}: {check.promise}",
            f"  found:        {what}",
            f"  usual cause:  {check.cause}",
            f"  what to do:   {remedy}",
            f"  look closer:  pytest -k {check.name}; the check is in {source}",
        ]
    )


def _raised_in(subject: type, error: Exception) -> str:
    """Return the last line in the traceback of an error that belongs to the author of the method; empty if there is
    none.

    Files in the same folder as the file of the class count as the author's.
    """
    try:
        folder = Path(inspect.getfile(subject)).parent
    except (TypeError, OSError):  # written in a notebook
        return ""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent == folder]
    return f"{Path(own[-1].filename).name}, line {own[-1].lineno}, in {own[-1].name}" if own else ""
