"""Options in another library's file: each is taken, ignored as harmless, or refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from peftcore.errors import CheckpointError, shown

T = TypeVar("T")
OFF: tuple[Any, ...] = (None, False, "", [], {})
"""Values with which an unknown option does nothing."""
REQUIRED: Any = ...
"""The default of an option that a file has to have."""


class Keys:
    """The options of one file, taken one by one."""

    def __init__(self, data: Mapping[str, Any], where: Path) -> None:
        self.data = dict(data)
        self.where = where
        self.known: set[str] = set()
        self.told: set[str] = set()

    def take(self, key: str, kind: type[T] | tuple[type, ...], default: Any = REQUIRED) -> Any:
        """Returns the value of an option.

        Args:
            kind: the types that it may have; whole numbers count as float, truth values not as whole numbers.
            default: its value where it is missing or null; without one it has to be there.

        Raises:
            CheckpointError: it is missing, or of another kind.
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
        """Returns an option that holds a list of names, or one of them; an empty list where it is missing.

        Raises:
            CheckpointError: it holds something else.
        """
        value = self.take(key, (list, str), [])
        found = [value] if isinstance(value, str) else value
        if not all(isinstance(each, str) for each in found):
            raise CheckpointError(f"{self.where}: {key!r} is {shown(value)}, expected names")
        return found

    def table(self, key: str) -> dict[str, Any]:
        """Returns an option that holds values by name; an empty dictionary where it is missing.

        Raises:
            CheckpointError: it holds something else.
        """
        found: dict[str, Any] = self.take(key, dict, {})
        return found

    def pass_over(self, *keys: str) -> None:
        """Ignore options about the file's origin, or how training began: they change nothing that is computed."""
        self.known.update(keys)

    def warn(self, message: str) -> None:
        """Warn the user of something in the file, once."""
        if message not in self.told:
            self.told.add(message)
            warnings.warn(f"{self.where}: {message}", UserWarning, stacklevel=2)

    def only(self, key: str, *values: Any) -> None:
        """Take an option of which only these values are understood here; what is missing or null is the first one. A
        value that is off will do as well, but not for an option that is to be on.

        Raises:
            CheckpointError: it has another value.
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
        """Returns the same options with other values of some."""
        found = Keys({**self.data, **changes}, self.where)
        found.known, found.told = self.known, self.told
        return found

    def check_known(self) -> None:
        """Refuse options that were not taken and are not off.

        Raises:
            CheckpointError: naming every such option.
        """
        strange = [key for key in sorted(self.data.keys() - self.known) if self.data[key] not in OFF]
        if strange:
            said = ", ".join(f"{key} = {shown(self.data[key])}" for key in strange[:8])
            raise CheckpointError(
                f"{self.where}: peftcore does not know these options, which may change the outputs: {said}"
            )
