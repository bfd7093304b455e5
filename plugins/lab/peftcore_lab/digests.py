"""Digests of the content of files, which show whether the content has changed."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

PIECE = 2**20
SAMPLE = 2**16
"""Bytes that are read at the beginning, in the middle and at the end of each file of a model."""
NOT_CONTENT = ("state.json", "cache-")
"""Prefixes of files in a saved dataset that are ignored, because these files can differ between datasets with the same
rows."""


def of_content(source: str) -> str | None:
    """Return a digest of a file, or of all files in a folder; None if the file or folder does not exist."""
    return _digest(source, _stamps(source), False) if Path(source).exists() else None


def of_sample(source: str) -> str | None:
    """Return a digest of a model's files, from their sizes and some bytes of each. The files may be too large to be
    read as a whole, and training changes bytes everywhere in a file. Return None if the file or folder does not
    exist."""
    return _digest(source, _stamps(source), True) if Path(source).exists() else None


def _files(source: str) -> Iterator[Path]:
    path = Path(source)
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    yield from (each for each in found if each.is_file() and not each.name.startswith(NOT_CONTENT))


def _stamps(source: str) -> tuple[tuple[str, int, int], ...]:
    """Return names, sizes and times of files. Files are not read again as long as these are unchanged."""
    return tuple((str(each), (stat := each.stat()).st_size, stat.st_mtime_ns) for each in _files(source))


@functools.lru_cache(maxsize=64)
def _digest(source: str, stamps: tuple[tuple[str, int, int], ...], sampled: bool) -> str:
    digest = hashlib.sha256()
    for name, size, _ in stamps:
        inside = Path(name).relative_to(source).as_posix()  # "." for a file
        digest.update(f"{inside} {size} ".encode())
        with open(name, "rb") as file:
            if sampled and size > 3 * SAMPLE:
                for place in (0, size // 2, size - SAMPLE):
                    file.seek(place)
                    digest.update(file.read(SAMPLE))
            else:
                while piece := file.read(PIECE):
                    digest.update(piece)
    return digest.hexdigest()
