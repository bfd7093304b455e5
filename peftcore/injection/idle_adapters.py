"""Idle adapters: offloads an adapter's tensors to CPU or disk and restores them. Meanwhile the operators stay
installed, with tensors that have shapes but no values.

While a parameter is offloaded, a stand-in without values replaces it in its module. The parameter is restored as the
same object, so references to it, such as those of an optimizer, stay valid. Until then, reading or writing it raises an
error.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from peftcore.errors import IdleAdapter, UnsupportedHost
from peftcore.injection.injection import Injection
from peftcore.layers.adapter_modules import IDLE

Values = Mapping[str, Tensor]
"""All tensors of an adapter by ``<site path>.<operator tensor>``, each once, including tensors that are not saved in
files."""


class Store(ABC):
    """Storage for the values of idle adapters."""

    @abstractmethod
    def keep(self, key: int, values: Values) -> None:
        """Store a copy of an adapter's values under a unique number. Later changes of the tensors do not change the
        copy.

        Raises:
            OSError: the values cannot be written.
        """

    @abstractmethod
    def values(self, key: int, names: Iterable[str]) -> Values:
        """Returns the named values that were last stored under a number.

        Raises:
            CheckpointError: the stored values were changed or damaged.
        """

    @abstractmethod
    def drop(self, key: int) -> None:
        """Delete the values stored under a number, if there are any."""

    @abstractmethod
    def returned(self, key: int) -> None:
        """Called after the values were restored on the model."""


class MemoryStore(Store):
    """Keeps values in the memory of the CPU."""

    def __init__(self) -> None:
        self._kept: dict[int, Values] = {}

    def keep(self, key: int, values: Values) -> None:
        self._kept[key] = {name: value.detach().to("cpu", copy=True) for name, value in values.items()}

    def values(self, key: int, names: Iterable[str]) -> Values:
        return {name: self._kept[key][name] for name in names}

    def drop(self, key: int) -> None:
        self._kept.pop(key, None)

    def returned(self, key: int) -> None:
        self.drop(key)


class IdleTensor(Tensor):
    """A tensor with a shape, dtype and device but without values: computing with it raises an error."""

    adapter: str
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __new__(cls, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> IdleTensor:
        made: IdleTensor = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device, storage_size=0)
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"StandIn({tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[Any, Any] | None = None
    ) -> Tensor:
        mine = next((each for each in tree_leaves((args, kwargs)) if isinstance(each, IdleTensor)), None)
        if function is torch.ops.aten.detach.default and mine is not None:
            made = IdleTensor(mine.shape, mine.dtype, mine.device)
            made.adapter = mine.adapter
            return made
        name = getattr(mine, "adapter", "")
        raise IdleAdapter(f"the adapter {name!r} is idle, so it cannot compute: {_back(name)}")


def _plain(*names: str) -> frozenset[Any]:
    return frozenset(getattr(Tensor, name) for name in names)


def _read(*names: str) -> frozenset[Any]:
    return frozenset(getattr(Tensor, name).__get__ for name in names)


def _set(*names: str) -> frozenset[Any]:
    return frozenset(getattr(Tensor, name).__set__ for name in names)


_OF_STAND_IN = _read(
    "shape", "dtype", "device", "ndim", "layout", "itemsize", "nbytes", "is_cpu", "is_cuda", "is_meta"
) | _plain(
    "size", "dim", "ndimension", "numel", "nelement", "element_size", "is_floating_point", "is_complex", "get_device",
    "__len__",
)  # fmt: skip
"""Functions that still work on an offloaded tensor: they return the result for its stand-in."""
_OF_ITSELF = (
    _plain("requires_grad_", "__hash__", "untyped_storage", "is_inference")
    | _read("requires_grad", "grad", "is_leaf", "grad_fn", "_version", "output_nr")
    | _set("requires_grad", "grad")
)
"""Functions that still work on an offloaded tensor itself, since they need no values."""


class _Away(Tensor):
    """The class of a tensor while its values are offloaded. Code that still holds the tensor gets an error if it reads
    or writes it."""

    stand_in: Any
    """The tensor without values that is registered instead of it."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        own = next(each for each in tree_leaves((args, kwargs)) if isinstance(each, _Away))
        with torch._C.DisableTorchFunctionSubclass():
            if function in _OF_ITSELF:
                return function(*args, **(kwargs or {}))
            if function in _OF_STAND_IN:
                return function(own.stand_in, *args[1:], **(kwargs or {}))
        name = own.stand_in.adapter
        raise IdleAdapter(f"the adapter {name!r} is idle, so its tensors have no values: {_back(name)}")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{self.stand_in!r} of the idle adapter {self.stand_in.adapter!r}"


class _AwayParameter(_Away, nn.Parameter):
    """A parameter whose values are offloaded."""


def _back(name: str) -> str:
    return f"activate it (peftcore.using, activate), call pool.wake({name!r}), or restore all adapters with pool.end()"


class _Held:
    """One tensor of an operator, at all the places where it is registered."""

    __slots__ = ("cls", "counts", "name", "places", "stand_in", "tensor")

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name, self.tensor, self.cls = name, tensor, type(tensor)
        self.counts = not tensor.is_inference()
        """Whether torch counts changes of the tensor, which it does not for inference tensors."""
        self.places: list[tuple[dict[str, Any], str]] = []
        self.stand_in: Tensor | None = None

    def replace(self, tensor: Tensor) -> None:
        """Register another tensor in all its places."""
        for table, name in self.places:
            table[name] = tensor

    def stand(self, adapter: str, dtype: torch.dtype, device: torch.device) -> None:
        """Register a stand-in (a tensor without values) of the same shape."""
        bare = IdleTensor(self.tensor.shape if self.stand_in is None else self.stand_in.shape, dtype, device)
        bare.adapter = adapter
        parameter = isinstance(self.tensor, nn.Parameter)
        self.stand_in = nn.Parameter(bare, requires_grad=False) if parameter else bare
        self.replace(self.stand_in)
        if isinstance(self.tensor, _Away):
            self.tensor.stand_in = self.stand_in

    def leave(self) -> None:
        """Remove the tensor's values. Later reads and writes of the tensor raise an error."""
        self.give(torch.empty(0, dtype=self.tensor.dtype, device=self.tensor.device))
        self.tensor.__class__ = _AwayParameter if isinstance(self.tensor, nn.Parameter) else _Away
        vars(self.tensor)["stand_in"] = self.stand_in

    def come(self, value: Tensor) -> None:
        """Restore the tensor's class, and give it values."""
        vars(self.tensor).pop("stand_in", None)  # gone where somebody exchanged the two, `torch.utils.swap_tensors`
        self.tensor.__class__ = self.cls
        self.give(value)

    def give(self, value: Tensor) -> None:
        """Replace the storage of the tensor by the storage of another one, or by a copy of it."""
        with torch.inference_mode(not self.counts):
            self.tensor.data = value if self.counts else value.clone()

    def written(self) -> None:
        """Increase the tensor's version counter, so that a backward through a graph that saved the tensor raises an
        error."""
        if self.counts:
            torch.autograd.graph.increment_version(self.tensor)


class IdleValues:
    """Counts, offloads and restores the tensor values of one injection. The `Residency` of a model (which limits the
    memory of its adapters) uses it."""

    def __init__(self, injection: Injection, store: Store, key: int) -> None:
        self._injection = weakref.ref(injection)
        self._store, self._key = store, key
        self._away: list[_Held] | None = None
        self._size: tuple[tuple[dict[str, Any], str], torch.dtype, int] | None = None
        """A cached byte count: where one of the tensors is registered, the dtype of that tensor, and the bytes of all
        tensors. The count is valid as long as that dtype is the same."""

    @property
    def injection(self) -> Injection:
        """The injection."""
        found = self._injection()
        assert found is not None, "a model has its injections as long as it has their residency"
        return found

    def bytes(self) -> int:
        """Returns how many bytes the tensors take, or will take after they are restored. The count is cached as long as
        their dtype does not change."""
        if self._size is not None:
            (table, name), dtype, size = self._size
            if table[name].dtype is dtype:
                return size
        held = self._held()
        now = [_now(each) for each in held]
        size = sum(each.numel() * each.element_size() for each in now)
        floats = [place for place, each in zip(held, now, strict=True) if each.is_floating_point()]
        if first := (floats or held)[:1]:
            table, name = first[0].places[0]
            self._size = (table, name), table[name].dtype, size
        return size

    def trains(self) -> bool:
        """Whether a parameter trains."""
        return any(parameter.requires_grad for parameter in self.injection.parameters())

    def fetch(self) -> Values:
        """Returns the values from the store."""
        return self._store.values(self._key, [each.name for each in self._held()])

    def take_out(self) -> None:
        """Move the values to the store and leave the tensors without values."""
        injection = self.injection
        found = self._held()
        self._store.keep(self._key, {each.name: each.tensor for each in found})
        values = [each.tensor.detach() for each in found]
        try:
            with torch.no_grad():
                for each in found:
                    tensor = each.tensor
                    each.stand(injection.name, tensor.dtype, tensor.device)
                    each.written()
                    each.leave()
            self._away = found
            for path, module in injection.modules():
                _mark(module, _Marked(self, path))
        except BaseException:
            self._return(found, values)
            raise

    def put_back(self, values: Values) -> None:
        """Restore the values of the tensors, with the dtypes and on the devices that `to` has set since they were
        offloaded."""
        assert self._away is not None, "only what is away comes back"
        with torch.no_grad():
            now = [_now(each) for each in self._away]
            ready = [values[each.name].to(to.device, to.dtype) for each, to in zip(self._away, now, strict=True)]
        held = self._away
        try:
            self._return(held, ready)
        except BaseException:  # interrupted: the values are here, so they come all the same
            self._return(held, ready)
            raise
        self._store.returned(self._key)

    @torch.no_grad()
    def _return(self, held: list[_Held], values: list[Tensor]) -> None:
        """Give the tensors their values again. The function can be repeated after an interrupt."""
        for each, value in zip(held, values, strict=True):
            each.come(value)
            each.written()
            each.stand_in = None
            each.replace(each.tensor)
        for _, module in self.injection.modules():
            _unmark(module)
        self._away = None

    def is_away(self) -> bool:
        """Whether the values are offloaded."""
        return self._away is not None

    def forget(self) -> None:
        """Delete the offloaded values from the store."""
        self._store.drop(self._key)

    def check_plain(self) -> None:
        """Verify that the tensors can be offloaded and restored.

        Raises:
            UnsupportedHost: the tensors are sharded over processes.
        """
        for each in self._held():
            if type(each.tensor) not in (Tensor, nn.Parameter):
                raise UnsupportedHost(
                    f"{self.injection.name!r} has tensors of the type {type(each.tensor).__name__}, which cannot be "
                    "offloaded: adapters of a sharded or wrapped model stay on it"
                )

    def _held(self) -> list[_Held]:
        if self._away is not None:
            return self._away
        found: dict[int, _Held] = {}
        for path, module in self.injection.modules():
            for below, inner in module.named_modules(prefix=path, remove_duplicate=False):
                for table in (inner._parameters, inner._buffers):
                    for name, tensor in table.items():
                        if tensor is not None:
                            held = found.setdefault(id(tensor), _Held(f"{below}.{name}", tensor))
                            held.places.append((table, name))
        return list(found.values())

    # ------------------------------------------------------------------------------ what torch does with idle modules

    def named(self, path: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yields the values of an idle module, by their names in its state dict."""
        assert self._away is not None
        names = {id(each.stand_in): each.name for each in self._away}
        held = {}
        for below, inner in module.named_modules(remove_duplicate=False):
            for name, tensor in (*inner._parameters.items(), *inner._buffers.items()):
                if tensor is not None and name not in inner._non_persistent_buffers_set:
                    held[f"{below}.{name}".lstrip(".")] = tensor
        values = self._store.values(self._key, {names[id(tensor)] for tensor in held.values()})
        for key, stand_in in held.items():
            yield key, values[names[id(stand_in)]].to(stand_in.dtype)

    def converted(self, module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        """Apply `to` and related methods to an idle module: record the dtype and device that each tensor gets when it
        is restored."""
        assert self._away is not None
        mine = {
            id(each) for inner in module.modules() for each in (*inner._parameters.values(), *inner._buffers.values())
        }
        with torch.no_grad():
            for each in self._away:
                now = _now(each)
                if id(now) in mine:
                    probe = function(torch.empty(0, dtype=now.dtype, device=now.device))
                    each.stand(self.injection.name, probe.dtype, probe.device)


def _now(held: _Held) -> Tensor:
    """Returns the tensor that is registered now: the original, or its stand-in."""
    return held.tensor if held.stand_in is None else held.stand_in


class _Marked:
    """The mark of an idle module. The module's ``__dict__`` contains it, together with functions that replace
    `state_dict`, `_apply` and other methods that torch calls. Both are removed when the adapter is restored."""

    def __init__(self, values: IdleValues, path: str) -> None:
        self.values, self.path = values, path

    def error(self, what: str) -> IdleAdapter:
        name = self.values.injection.name
        return IdleAdapter(f"{self.path}: the adapter {name!r} is idle, so {what}: {_back(name)}")


_ANSWERS = ("state_dict", "_load_from_state_dict", "_apply", "__reduce_ex__")


def _mark(module: nn.Module, mark: _Marked) -> None:
    for inner in module.modules():
        _answer(inner, mark)
    module.__dict__[IDLE] = mark


def _answer(module: nn.Module, mark: _Marked) -> None:
    def state_dict(*args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        if keep_vars:
            raise mark.error("state_dict(keep_vars=True) cannot return its parameters")
        destination = {} if destination is None else destination
        for key, value in mark.values.named(mark.path, module):
            destination[prefix + key] = value
        return destination

    def load(state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
        if any(key.startswith(prefix) for key in state_dict):
            raise mark.error("a state dict cannot be loaded into it")

    def apply(function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        mark.values.converted(module, function)
        return module

    def reduce(protocol: object) -> NoReturn:
        raise mark.error("a copy or a pickle of the model would lack its values")

    module.__dict__.update(zip(_ANSWERS, (state_dict, load, apply, reduce), strict=True))


def _unmark(module: nn.Module) -> None:
    for inner in module.modules():
        for name in (IDLE, *_ANSWERS):
            inner.__dict__.pop(name, None)
