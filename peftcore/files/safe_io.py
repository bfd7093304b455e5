"""Reading and writing adapter files: files are untrusted, and none is left half-written.

Reading accepts only JSON and safetensors, and checks sizes, structure and names before it allocates memory. Writing
replaces each file as a whole: if the process is killed, the power fails or the disk is full, the old file still exists.
When a function that writes returns, the file and its name are on the disk, provided that the file system implements
`fsync` and atomic renames.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import shutil
import stat
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from peftcore.contract.config import fits
from peftcore.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MAX_HEADER = 32 * 2**20
"""The largest header of a safetensors file, in bytes: twice the size that a hundred thousand tensors need."""
MAX_JSON = 16 * 2**20
"""The largest JSON file with an adapter's options, in bytes; real ones are far smaller."""
MAX_VALUES = 500_000
"""The largest number of values in a JSON file."""
MAX_DEPTH = 64
"""The deepest nesting of values in a JSON file."""
SAFE_CALLS = 5_000
"""The largest recursion limit with which Python's JSON parser is certain to raise an error for deeply nested values.
Some libraries set a higher limit, with which the C stack would overflow and the process would crash. Nesting is then
checked before parsing."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip
"""The dtypes that tensors of adapters may have, keyed by their names in safetensors."""


def _regular(path: Path) -> int:
    """Returns the size of a regular file. Links are followed, since the hub's cache consists of links."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a regular file")
    return status.st_size


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:80]!r} appears twice")
        found[key] = value
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not valid JSON")


def _whole(digits: str) -> int:
    if len(digits) > 20 or not fits(number := int(digits)):
        raise ValueError(f"an integer of {len(digits)} digits is too large")
    return number


def _nesting(text: str | bytes) -> int:
    """Returns how deeply lists and objects are nested."""
    text = text if isinstance(text, str) else text.decode(json.detect_encoding(text))
    outside = re.sub(r'"(?:[^"\\]|\\.)*"', "", text, flags=re.DOTALL)
    steps = (1 if mark in "[{" else -1 for mark in re.findall(r"[][{}]", outside))
    return max(accumulate(steps), default=0)


def _object(text: str | bytes, where: object) -> dict[str, Any]:
    try:
        if sys.getrecursionlimit() > SAFE_CALLS and _nesting(text) > MAX_DEPTH:
            raise ValueError("it is nested too deeply for an adapter's options")
        found = json.loads(text, object_pairs_hook=_once, parse_constant=_refuse, parse_int=_whole)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{where} cannot be read: it is not a JSON object")
    return found


def parse_json(text: str | bytes, where: object) -> dict[str, Any]:
    """Returns the JSON object in a text, which must be of reasonable size, without repeated keys, NaN, infinities, or
    integers of more than 64 bits.

    Raises:
        CheckpointError: the text is not such an object; the message names `where`.
    """
    if len(text) > MAX_JSON:
        raise CheckpointError(f"{where} cannot be read: {len(text):,} bytes are too many for an adapter's options")
    found = _object(text, where)
    level: list[Any] = [found]
    count = depth = 0
    while level:
        count, depth = count + len(level), depth + 1
        if count > MAX_VALUES or depth > MAX_DEPTH:
            raise CheckpointError(f"{where} cannot be read: it has too many values for an adapter's options")
        inside = [each for each in level if isinstance(each, (dict, list))]
        level = [value for each in inside for value in (each.values() if isinstance(each, dict) else each)]
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
        CheckpointError: the file is missing, too large, or not a JSON object.
    """
    _regular(path)
    try:
        with path.open("rb") as file:
            text = file.read(MAX_JSON + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    return parse_json(text, path)


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file: names, shapes and dtypes are read and checked first, values only by `read`."""

    path: Path
    """Path of the file."""

    @cached_property
    def header(self) -> dict[str, Any]:
        """The header of the file.

        Raises:
            CheckpointError: it is damaged, or not a safetensors file.
        """
        size = _regular(self.path)
        try:
            with self.path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > min(size - 8, MAX_HEADER):
                    raise CheckpointError(f"{self.path} cannot be read: it is cut off, or not a safetensors file")
                text = file.read(length)
            with safe_open(self.path, framework="pt"):
                pass  # kinds of entries, offsets, overlaps, lengths
            header = _object(text, self.path)
        except (SafetensorError, OSError, OverflowError, MemoryError) as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}") from None
        return header

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The texts in the file's metadata."""
        return dict(self.header.get("__metadata__") or {})

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Every tensor's shape, by name."""
        return {key: torch.Size(each["shape"]) for key, each in self.header.items() if key != "__metadata__"}

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Every tensor's dtype, by name.

        Raises:
            CheckpointError: adapters have no tensors of such a dtype.
        """
        named = {key: each["dtype"] for key, each in self.header.items() if key != "__metadata__"}
        if strange := sorted(f"{key} has dtype {name}" for key, name in named.items() if name not in DTYPES):
            raise CheckpointError(f"{self.path}: adapters have no tensors of such dtypes: {'; '.join(strange[:8])}")
        return {key: DTYPES[name] for key, name in named.items()}

    def read(self, keys: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Returns the values of tensors, keyed by name and copied into memory.

        Raises:
            CheckpointError: they cannot be read, or some are not finite; all such tensors are named.
        """
        wanted = sorted(self.dtypes if keys is None else keys)
        try:
            with safe_open(self.path, framework="pt") as file:
                found = {key: file.get_tensor(key).clone() for key in wanted}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}") from None
        broken = [key for key, value in found.items() if value.is_floating_point() and not value.isfinite().all()]
        if broken:
            raise CheckpointError(f"{self.path} holds values that are not finite in {', '.join(broken[:8])}")
        return found


Write = Callable[[Path], Any]
"""A function that writes the content of a new file to a path."""


def _put(path: Path, write: Write) -> None:
    put_files({path: write})


def put_files(files: Mapping[Path, Write], together: Collection[Path] = ()) -> None:
    """Fill new files, then rename all of them to their paths. The contents are flushed to the disk before the first
    rename, and the names after the last one: after a power cut, each path has either the old file or the new one.

    Args:
        files: the function that writes each path's new file. The files are renamed in this order.
        together: paths of files that are read together. If several of them are replaced, the old ones are moved away
            first: a process that is killed between two renames leaves files missing, never a mixture of old and new
            ones. If a rename fails, the old files are put back.
    """
    tied = [path for path in files if path in together]
    tied = tied if len(tied) > 1 else []
    with ExitStack() as stack:
        filled = {path: stack.enter_context(_filled(path, write)) for path, write in files.items()}
        moved: dict[Path, Path] = {}
        try:
            for path in tied:
                if path.exists():
                    moved[path] = filled[path].with_name("before")
                    os.replace(path, moved[path])
            for folder in {path.parent for path in moved}:
                sync_folder(folder)  # or a power cut may keep a later rename and lose this one
            for path, partial in filled.items():
                os.replace(partial, path)
        except BaseException:
            for path in tied:
                if not filled[path].exists():
                    path.unlink(missing_ok=True)
            for path, before in moved.items():
                if before.exists():
                    os.replace(before, path)
            raise
    for folder in {path.parent: None for path in files}:
        sync_folder(folder)


@contextmanager
def _filled(path: Path, write: Write) -> Iterator[Path]:
    """Context manager that writes a new file, flushes it to the disk and yields its path. The file is in a temporary
    folder next to its destination, since libraries may write more files beside it. The folder is removed at the end."""
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        try:
            scratch.mkdir()
            partial = scratch / path.name
            write(partial)
            partial.chmod(scratch.stat().st_mode & 0o666)  # as the umask has it; libraries may make files private
            sync_file(partial)
            yield partial
        finally:
            discard(scratch)
    finally:  # also where the first removal is interrupted before it begins
        discard(scratch)


@contextmanager
def folder_lock(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Context manager that locks a folder for one process that writes, or with `shared` for several processes that
    read. Other processes wait. The operating system releases the lock of a process that is killed. On systems without
    file locks, nothing is locked."""
    if fcntl is None or not folder.is_dir():
        yield
        return
    with _OpenFolder(folder) as number:
        try:
            with suppress(OSError):
                fcntl.flock(number, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
            yield
        finally:
            with suppress(OSError):  # a process that was forked meanwhile has the number too, and would keep the lock
                fcntl.flock(number, fcntl.LOCK_UN)


def sync_file(path: Path) -> None:
    """Wait until the content of a file is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, on systems that can open folders."""
    if os.name == "nt":
        return
    try:
        with _OpenFolder(folder) as number:
            os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that sync no folders
            raise


class _OpenFolder:
    """Context manager that opens a folder and yields its file descriptor; an interrupt does not leave it open."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._number = folder, -1

    def __enter__(self) -> int:
        self._number = os.open(self._folder, os.O_RDONLY)
        return self._number

    def __exit__(self, *_: object) -> None:
        os.close(self._number)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, unless they exist, and flush their names to the disk."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def discard(folder: Path) -> None:
    """Remove a temporary folder and its remaining content. If the first try fails or is interrupted, try again."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        if os.path.lexists(folder):
            shutil.rmtree(folder, ignore_errors=True)


def is_text(path: Path, text: str) -> bool:
    """Returns whether a file already has this text."""
    return path.is_file() and path.stat().st_size <= MAX_JSON and path.read_bytes() == text.encode()


def of_text(text: str) -> Write:
    """Returns a function that writes `text` to a path."""
    return lambda path: path.write_text(text, encoding="utf-8")


def write_text(path: Path, text: str) -> None:
    """Write a text file completely, or not at all. A file that already has this text is not written again."""
    if is_text(path, text):
        sync_folder(path.parent)  # the process that wrote it may have been killed before
        return
    _put(path, of_text(text))


def of_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Write:
    """Returns a function that writes tensors to a safetensors file. Equal tensors give equal bytes.

    Args:
        tensors: the tensors by name. Tensors that share memory, as after ``vector_to_parameters`` and in the flat
            buffers of some optimizers, are copied, since the safetensors library refuses them.
        metadata: at most one text, since the library writes several texts in random order.
    """
    ready = {key: tensors[key].detach().cpu().contiguous() for key in sorted(tensors)}
    shared = Counter(value.untyped_storage().data_ptr() for value in ready.values())
    ready = {
        key: value.clone() if shared[value.untyped_storage().data_ptr()] > 1 else value for key, value in ready.items()
    }

    def write(path: Path) -> None:
        try:
            save_file(ready, path, metadata=dict(metadata) or None)  # {} without tensors breaks the file's header
        except SafetensorError as error:  # a full disk, for instance
            raise OSError(f"{path.name} cannot be written: {error}") from error

    return write


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors to a safetensors file, completely or not at all. The arguments are those of `of_tensors`."""
    _put(path, of_tensors(tensors, metadata))


def clear_partial(folder: Path, name: str = "") -> None:
    """Remove temporary files that killed processes left in a folder, if they are older than an hour. With `name`,
    remove only those of the file with this name."""
    for path in folder.glob(f".{glob.escape(name)}*.partial"):
        if path.is_dir() and not path.is_symlink() and time.time() - path.lstat().st_mtime > 3600:
            shutil.rmtree(path, ignore_errors=True)
