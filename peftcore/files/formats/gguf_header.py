"""Reads the header of a file of llama.cpp: its options, and names, shapes and dtypes of its tensors, without values.

The format is described in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Versions 2 and 3 are read, in
little-endian. Each length in the file is checked against the size of the file before it is used.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO

from peftcore.errors import CheckpointError
from peftcore.files.safe_io import TensorFile

MAGIC = b"GGUF"
VERSIONS = (2, 3)
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Maps the types of options that are numbers to format characters of `struct`."""
TEXT, LIST = 8, 9
DEPTH = 4
"""The maximum depth of nested lists."""
DIMS = 4
DTYPES = {0: "F32", 1: "F16", 28: "F64", 30: "BF16"}
"""Maps dtypes of tensors to their names in safetensors. All other dtypes are packed."""


@dataclass(frozen=True)
class GGUFFile(TensorFile):
    """A file of llama.cpp. Only its header is read."""

    @cached_property
    def header(self) -> dict[str, Any]:
        """The header, converted to the form of a safetensors header.

        Raises:
            CheckpointError: it is damaged, or of another version.
        """
        try:
            with self.path.open("rb") as file:
                return _header(_Cursor(file, self.path.stat().st_size))
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{self.path} cannot be read as GGUF: {error}") from None

    @property
    def options(self) -> dict[str, Any]:
        """The options of the file."""
        found: dict[str, Any] = self.header["__metadata__"]
        return found


class _Cursor:
    """Reads a file from its beginning, and raises a `ValueError` at its end."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.left = file, size

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise ValueError("it is cut off")
        self.left -= count
        return self.file.read(count)

    def number(self, letter: str) -> Any:
        [value] = struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}")))
        return value

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == TEXT:
            return self.text()
        if kind != LIST or depth == DEPTH:
            raise ValueError(f"an option has the unknown type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if count > self.left:  # each takes a byte at least
            raise ValueError("it is cut off")
        return [self.value(inner, depth + 1) for _ in range(count)]


def _header(cursor: _Cursor) -> dict[str, Any]:
    if cursor.take(len(MAGIC)) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = cursor.number("I")
    if version not in VERSIONS:
        raise ValueError(f"it has version {version}; peftcore reads {' and '.join(map(str, VERSIONS))}, little-endian")
    tensors, options = cursor.number("Q"), cursor.number("Q")
    if tensors + options > cursor.left:
        raise ValueError("it is cut off")
    said = {cursor.text(): cursor.value(cursor.number("I")) for _ in range(options)}
    found: dict[str, Any] = {"__metadata__": said}
    for _ in range(tensors):
        name, dims = cursor.text(), cursor.number("I")
        if dims > DIMS:
            raise ValueError(f"{name} has {dims} dimensions")
        shape = [cursor.number("Q") for _ in range(dims)][::-1]
        kind, _ = cursor.number("I"), cursor.number("Q")
        found[name] = {"shape": shape, "dtype": DTYPES.get(kind, f"the packed type {kind}")}
    return found
