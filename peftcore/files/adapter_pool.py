"""`keep_within` keeps a model's adapters within a memory limit: values of idle adapters are on the CPU or in files."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from peftcore.errors import CheckpointError, ConfigError, UnknownInjection, shown
from peftcore.files.safe_io import DTYPES, TensorFile, write_tensors
from peftcore.forward.choice.residency import Residency
from peftcore.forward.state.host_state import HostState, drop_state, ensure_state, state_of
from peftcore.injection.base_dependence import make_anew
from peftcore.injection.idle_adapters import IdleValues, MemoryStore, Store, Values
from peftcore.injection.injection import Injection
from peftcore.injection.request import check_model
from peftcore.layers.model_locks import changing
from peftcore.utils.journal import Journal

Shapes = dict[str, tuple[torch.dtype, torch.Size]]
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
"""The number of bytes of each unit that a limit may be written in."""


def bytes_of(limit: int | str) -> int:
    """Returns a limit such as ``"2GB"`` as a number of bytes.

    Raises:
        ConfigError: `limit` is not an amount of memory.
    """
    if isinstance(limit, int) and not isinstance(limit, bool) and limit >= 0:
        return limit
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", limit) if isinstance(limit, str) else None
    if found is None or found[2].upper() not in UNITS:
        raise ConfigError(
            f'a limit is a number of bytes, or a text such as "500MB", "2GB" or "2GiB", not {shown(limit)}'
        )
    return int(float(found[1]) * UNITS[found[2].upper()])


def keep_within(
    model: nn.Module, limit: int | str, idle: str | os.PathLike[str] | Literal["cpu"] = "cpu"
) -> AdapterPool:
    """Keep the adapters of a model, those installed now and later, within a limit of bytes on the model's devices.

        pool = peftcore.keep_within(model, "2GB", idle="/fast/disk/idle")
        for name, folder in thousands:
            peftcore.load(model, folder, name=name, active=False)
        peftcore.using(model, "mail")(model, ids)  # restores "mail", and makes others idle

    When the limit is reached, the least recently used adapters become idle: their values are moved to the CPU or into
    files. An idle adapter is restored when `activate`, `route`, `using` or a composition names it, or when its `save`,
    `merge`, `optimizer`, `swap` or `state_dict` is called: the same parameter objects have the same bits again. An
    adapter cannot become idle while it is active in any thread or task, used by a running forward, merged, or in
    training. If such adapters leave no room for the named adapter, the call raises `MemoryLimit`, and the active
    adapters do not change. A state dict of the model has the values of all adapters. `model.to` moves idle adapters
    when they are restored. A model with idle adapters cannot be copied or pickled.

    When an adapter becomes idle again, its values are written only if they changed since they were restored. Reading a
    file that was changed by another program raises an error.

    The pool does not see forwards of compiled models. If one thread runs them and another thread calls `activate`, run
    them within `using`, so that their adapters do not become idle.

    Args:
        model: the host; it may have no adapters yet.
        limit: the number of bytes, or a text such as "500MB", "2GB" or "2GiB", for the parameters and buffers of all
            adapters that are not idle. The base is not counted.
        idle: where to keep the values of idle adapters: "cpu" for CPU memory, if the model is on another device; or a
            folder, in which the pool creates its own folder and removes it at the end.

    Returns:
        The pool, with the limit and the names of the idle adapters. Its `end()` removes the limit.

    Raises:
        ConfigError: the limit is not an amount of memory, the model already has a pool, its adapters belong to a
            submodule, or `idle` is "cpu" and the model is on the CPU.
        MemoryLimit: the adapters that cannot become idle now need more than the limit.
        UnsupportedHost: the adapters are sharded over processes.
    """
    check_model(model)
    room = bytes_of(limit)
    with changing(model):
        fresh = state_of(model) is None
        state = state_of(model) or HostState()
        if state.residency is not None:
            raise ConfigError("this model has an AdapterPool already: set pool.limit, or call pool.end() first")
        inside = [path for path, module in model.named_modules() if path and state_of(module) is not None]
        if fresh and inside:
            raise ConfigError(f"this model has no adapters, but its submodule {inside[0]!r} has: pass that submodule")
        on_cpu = all(each.device.type == "cpu" for each in model.parameters())
        if idle == "cpu" and on_cpu:
            raise ConfigError('the model is on the CPU, so idle="cpu" would free no memory: pass a folder, idle=path')
        store: Store = MemoryStore() if idle == "cpu" else FolderStore(Path(idle))
        with Journal() as journal:
            state = ensure_state(journal, model, list(model.modules()), make_anew)
            pool = AdapterPool(model, state, room, store)
            for injection in state.injections.values():
                pool.residency.add(injection)
            journal.set(state, "residency", pool.residency)
            try:
                pool.residency.make_room()
            except BaseException:
                pool.residency.limit = 2**63
                pool.residency.bring(pool.idle)  # the stored values would be removed with the pool
                raise
        return pool


class AdapterPool:
    """The memory limit of a model's adapters, returned by `keep_within`. It lists the adapters on the model's devices,
    and the idle ones, whose values are on the CPU or in files. The limit applies until `end` is called, even if the
    caller keeps no reference to the pool."""

    def __init__(self, model: nn.Module, state: HostState, limit: int, store: Store) -> None:
        numbers = iter(range(2**62))

        def account(injection: Injection) -> IdleValues:
            values = IdleValues(injection, store, next(numbers))
            values.check_plain()
            return values

        self._model, self._state = weakref.ref(model), weakref.ref(state)
        self.residency = Residency(state, limit, account)

    @property
    def limit(self) -> int:
        """The limit in bytes. Setting a lower limit makes adapters idle. It raises `MemoryLimit` if the adapters that
        cannot become idle need more memory."""
        return self.residency.limit

    @limit.setter
    def limit(self, limit: int | str) -> None:
        before, self.residency.limit = self.residency.limit, bytes_of(limit)
        try:
            self.residency.make_room()
        except BaseException:
            self.residency.limit = before
            raise

    @property
    def bytes(self) -> int:
        """The bytes of all adapters that are not idle."""
        return self.residency.bytes()

    @property
    def resident(self) -> list[str]:
        """The names of the adapters that are not idle, the least recently used first."""
        return self.residency.names(True)

    @property
    def idle(self) -> list[str]:
        """The names of the idle adapters."""
        return self.residency.names(False)

    def wake(self, *names: str) -> None:
        """Restore the values of idle adapters in advance, so that the first forward that uses them is not delayed.

        Raises:
            UnknownInjection: the model has no injection of this name.
            MemoryLimit: the memory limit is too low for these adapters together with those that cannot become idle.
            CheckpointError: a file with the values of one of them was changed or damaged.
        """
        self.residency.bring(self._known(names))

    def rest(self, *names: str) -> list[str]:
        """Make adapters idle now: their values are moved to the CPU or to files. Returns the names of adapters that
        cannot become idle, since they are active, in training or merged.

        Raises:
            UnknownInjection: the model has no injection of this name.
        """
        return self.residency.rest(self._known(names))

    def end(self) -> None:
        """Restore all idle adapters, and remove the limit."""
        state, model = self._state(), self._model()
        if state is None or model is None:
            return
        with changing(model):
            if state.residency is not self.residency:
                return
            with self.residency.lock:
                self.residency.limit = 2**63
                self.residency.bring(self.idle)
                state.residency = None
            if not state.injections and state.can_go():
                drop_state(Journal(), model)

    def _known(self, names: tuple[str, ...]) -> tuple[str, ...]:
        state = self._state()
        for name in names:
            if state is None or name not in state.injections:
                raise UnknownInjection(f"no injection named {name!r} on the model of this pool")
        return names

    def __repr__(self) -> str:
        resident, idle = len(self.resident), len(self.idle)
        return f"AdapterPool({resident} on the model, {idle} idle, {self.bytes:,} of {self.limit:,} bytes)"


class FolderStore(Store):
    """Stores the values of idle adapters in a temporary folder, one safetensors file for each adapter. Reading raises
    an error if another program changed the file. Values that did not change since they were read are not written
    again."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix="peftcore-idle-", dir=folder))
        self._written: dict[int, tuple[dict[str, bytes], tuple[int, int], Shapes]] = {}
        """Three facts about each written adapter, keyed by its number: the digests of the tensors, the size and time of
        the file, and the dtypes and shapes of tensors that are stored in it as raw bytes."""
        weakref.finalize(self, shutil.rmtree, self._folder, True)

    def keep(self, key: int, values: Values) -> None:
        digests = {name: digest(value) for name, value in values.items()}
        path = self._path(key)
        strange = {name: (each.dtype, each.shape) for name, each in values.items() if each.dtype not in DTYPES.values()}
        if self._written.get(key) == (digests, _seen(path), strange):
            return
        plain = {name: _as_bytes(value) if name in strange else value for name, value in values.items()}
        write_tensors(path, plain, {})
        self._written[key] = digests, _seen(path), strange

    def values(self, key: int, names: Iterable[str]) -> Values:
        (digests, _, strange), path, wanted = self._written[key], self._path(key), list(names)
        if TensorFile(path).shapes.keys() != digests.keys():
            raise CheckpointError(f"{path} does not hold the tensors that were written to it: it was changed")
        try:
            with safe_open(path, framework="pt") as file:
                found = {name: file.get_tensor(name).clone() for name in wanted}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
        for name in strange.keys() & found.keys():
            dtype, shape = strange[name]
            found[name] = found[name].view(dtype).reshape(shape)
        if wrong := [name for name, value in found.items() if digest(value) != digests[name]]:
            raise CheckpointError(f"{path} was changed since it was written, or is damaged: {', '.join(wrong[:8])}")
        return found

    def drop(self, key: int) -> None:
        self._written.pop(key, None)
        self._path(key).unlink(missing_ok=True)

    def returned(self, key: int) -> None:
        """Keep the file, so that values that do not change need not be written again."""

    def _path(self, key: int) -> Path:
        return self._folder / f"{key}.safetensors"


def _seen(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def digest(value: Tensor) -> bytes:
    """Returns a digest of a tensor's dtype, shape and bits."""
    plain = value.detach().cpu().contiguous()
    found = hashlib.blake2b(f"{plain.dtype} {tuple(plain.shape)}".encode(), digest_size=16)
    found.update(_as_bytes(plain).numpy().data)
    return found.digest()


def _as_bytes(value: Tensor) -> Tensor:
    return value.detach().contiguous().reshape(-1).view(torch.uint8)
