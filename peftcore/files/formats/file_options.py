"""Reads the options of another library's file: each option is read, ignored as harmless, or refused with an error that
names it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from peftcore.errors import CheckpointError, shown

T = TypeVar("T")
OFF: tuple[Any, ...] = (None, False, "", [], {})
"""Values that switch an unknown option off."""
REQUIRED: Any = ...
"""The default that marks an option as required in the file."""


class Keys:
    """The options of one file. Methods such as `take` read them, and `check_known` finds options that were never
    read."""

    def __init__(self, data: Mapping[str, Any], where: Path) -> None:
        self.data = dict(data)
        self.where = where
        self.known: set[str] = set()
        self.told: set[str] = set()

    def take(self, key: str, kind: type[T] | tuple[type, ...], default: Any = REQUIRED) -> Any:
        """Returns the value of an option, and marks the option as read.

        Args:
            kind: the types that it may have. An int is accepted as a float, but a bool not as an int.
            default: the value if the option is missing or null; without a default the option is required.

        Raises:
            CheckpointError: it is missing, or has another type.
        """
        self.known.add(key)
        value = self.data.get(key)
        if value is None and default is not REQUIRED:
            return default
        kinds: tuple[type, ...] = kind if isinstance(kind, tuple) else (kind,)
        if float in kinds:
            kinds = (*kinds, int)
        if (isinstance(value, bool) and bool not in kinds) or not isinstance(value, kinds):
            names = " or ".join(each.__name__ for each in kinds)
            found = "is missing" if key not in self.data else f"is {shown(value)}"
            raise CheckpointError(f"{self.where}: {key!r} {found}, expected {names}")
        return value

    def names(self, key: str) -> list[str]:
        """Returns the names in an option that is a list of names or a single name; an empty list if it is missing.

        Raises:
            CheckpointError: it holds something else.
        """
        value = self.take(key, (list, str), [])
        found = [value] if isinstance(value, str) else value
        if not all(isinstance(each, str) for each in found):
            raise CheckpointError(f"{self.where}: {key!r} is {shown(value)}, expected names")
        return found

    def table(self, key: str) -> dict[str, Any]:
        """Returns an option that is a JSON object, as a dictionary; an empty dictionary if the option is missing.

        Raises:
            CheckpointError: it holds something else.
        """
        found: dict[str, Any] = self.take(key, dict, {})
        return found

    def pass_over(self, *keys: str) -> None:
        """Ignore options that do not change the adapter's outputs, such as the origin of the file or the
        initialization."""
        self.known.update(keys)

    def warn(self, message: str) -> None:
        """Warn about something in the file; a repeated message is shown only once."""
        if message not in self.told:
            self.told.add(message)
            warnings.warn(f"{self.where}: {message}", UserWarning, stacklevel=2)

    def only(self, key: str, *values: Any) -> None:
        """Check that an option has one of `values`, the only ones that peftcore supports. A missing option counts as
        the first value. A value that switches the option off (`OFF`) is accepted too, unless `values` contains True.

        Raises:
            CheckpointError: the option has another value.
        """
        self.known.add(key)
        value = self.data.get(key, values[0])
        off = value is None or (value in OFF and True not in values)
        if value not in values and not off:
            raise CheckpointError(
                f"{self.where}: {key!r} is {shown(value)}, which changes what the adapter computes in a way that "
                f"peftcore does not support; it supports {' and '.join(map(repr, values))}"
            )

    def patched(self, changes: Mapping[str, Any]) -> Keys:
        """Returns a copy of the options with the values in `changes`; options that are read from one of them count as
        read in both."""
        found = Keys({**self.data, **changes}, self.where)
        found.known, found.told = self.known, self.told
        return found

    def check_known(self) -> None:
        """Raise an error if the file has options that were never read and are not switched off.

        Raises:
            CheckpointError: there are such options; the message names them.
        """
        strange = [key for key in sorted(self.data.keys() - self.known) if self.data[key] not in OFF]
        if strange:
            said = ", ".join(f"{key} = {shown(self.data[key])}" for key in strange[:8])
            raise CheckpointError(
                f"{self.where}: peftcore does not know these options, which may change the outputs: {said}"
            )
