"""Writes the output of a command on adapter files. The complete output is moved to its path when the command ends, and
never replaces files that the command reads."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from peftcore.errors import BadInput
from peftcore.files.safe_io import discard

SUFFIX = ".safetensors"
SHARED = ("README.md", ".gitattributes")
"""Files that any folder may contain, so that they do not prove that the folder is the result of an earlier run."""


class AdapterOutput:
    """A folder, or a single ``.safetensors`` file, that a command writes.

    Args:
        path: the path of the folder or file.
        overwrite: True if it may replace an earlier result.
        sources: the files and folders that the command reads.

    Raises:
        BadInput: the output cannot be written to this path, or would replace other files.
    """

    def __init__(self, path: Path, overwrite: bool, sources: Sequence[Path]) -> None:
        self.path, self.overwrite = Path(os.path.realpath(path)), overwrite
        self.shown = path
        for source in map(Path, map(os.path.realpath, sources)):
            if self.path in (source, *source.parents):
                raise BadInput(f"--out {path} is or contains {source}, which is read; choose another folder")
        if self.path.exists() and self._filled():
            kind = "exists" if self.path.is_file() else "is not empty"
            if self.path.is_dir() == self.single:
                raise BadInput(f"--out {path} exists and is not a {'file' if self.single else 'folder'}")
            if not overwrite:
                raise BadInput(f"--out {path} {kind}; choose another one, or pass --overwrite")
        self._above = next(each for each in self.path.parents if each.exists())
        if not self._above.is_dir() or not os.access(self._above, os.W_OK):
            raise BadInput(f"--out {path}: cannot write into {self._above}")

    @property
    def single(self) -> bool:
        """True if the output is a single file."""
        return self.path.suffix == SUFFIX and not self.path.is_dir()

    @contextmanager
    def filled(self) -> Iterator[Path]:
        """Yield a new folder to write into. At the end of the block its contents are moved to `path`; after an error
        nothing is moved. If the output is a single file, only the file with the tensors is moved.
        """
        partial = self._above / f".{self.path.name}.{uuid.uuid4().hex[:8]}.partial"
        try:
            partial.mkdir()
            yield partial
            ready = self._only(partial) if self.single else partial
            self._check_earlier(ready)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._put(ready)
        except (OSError, SafetensorError) as error:
            raise BadInput(f"--out {self.shown}: cannot be written ({error})") from error
        finally:
            discard(partial)

    def _filled(self) -> bool:
        return not self.path.is_dir() or any(self.path.iterdir())

    def _only(self, folder: Path) -> Path:
        [found] = folder.glob(f"*{SUFFIX}")
        return found

    def _check_earlier(self, ready: Path) -> None:
        """Check that the folder to overwrite is the result of an earlier run: it has at least one file with the name of
        a new file."""
        if not self.path.is_dir() or not self._filled():
            return
        names = {each.name for each in ready.iterdir()} - set(SHARED)
        if not any((self.path / name).exists() for name in names):
            held = ", ".join(sorted(each.name for each in self.path.iterdir())[:4])
            raise BadInput(
                f"--out {self.shown} contains other files ({held}); --overwrite only replaces earlier results"
            )

    def _put(self, ready: Path) -> None:
        if not self.path.is_dir():
            os.replace(ready, self.path)
            return
        aside = ready.with_name(f"{ready.name}.old")
        os.rename(self.path, aside)
        try:
            os.rename(ready, self.path)
        except BaseException:
            os.rename(aside, self.path)
            raise
        discard(aside)
