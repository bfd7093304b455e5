"""Records of the writes of a merge into a host: the places, how to undo the writes, and whether other code has changed
the tensors since.

A merge does not write to the host's tensors, since other objects may hold them, such as an optimizer or a reference
model with the same base. A new tensor replaces the old one in all modules of the host. The exception is `Overwritten`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftcore.errors import MergeError
from peftcore.injection.originals import Fingerprint, OriginalTensor, brought_back, fingerprint
from peftcore.layers.computed_tensors import computation
from peftcore.layers.pieces import is_cut
from peftcore.libraries.save_pretrained import saving_base
from peftcore.registry.plugins import layer_of
from peftcore.utils.journal import Journal

Holder = tuple[str, nn.Module, str]
"""A module that holds a tensor: its path in the host, the module, and the tensor's name there."""
Holders = Mapping[int, list[Holder]]
"""The modules of a host that hold a tensor as a parameter or buffer, by id of the tensor."""
Key = tuple[str, str]
"""The key of a merged tensor: (module path, tensor path below the module)."""
Predict = Callable[[Key, Tensor], Tensor]
"""A function that predicts an original tensor: it returns the merged tensor minus the change."""


def modules_of(model: nn.Module) -> dict[nn.Module, str]:
    """Returns the modules of a host with their paths. Operators are left out, since their tensors are never tied to
    tensors of the host."""
    with saving_base():
        return {module: path for path, module in model.named_modules()}


def holders_of(model: nn.Module) -> dict[int, list[Holder]]:
    """Returns the modules that hold each tensor of a host, by id of the tensor."""
    found: dict[int, list[Holder]] = {}
    for module, path in modules_of(model).items():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    found.setdefault(id(tensor), []).append((path, module, name))
    return found


def held(module: nn.Module, name: str) -> Tensor | None:
    """Returns the tensor that a module stores under a name; None for a computed tensor."""
    for table in (module._parameters, module._buffers, vars(module)):
        if name in table:
            found: Tensor | None = table[name]
            return found
    return None


def owner_path(key: Key) -> str:
    """Returns the path of the module that has a tensor."""
    return f"{key[0]}.{key[1].rpartition('.')[0]}".strip(".")


class MergeWrite(ABC):
    """One change that a merge made."""

    key: Key

    def outgoing(self) -> Iterable[Tensor]:
        """Returns the tensors that were replaced in the host, if they still exist."""
        return ()

    def incoming(self) -> Iterable[Tensor]:
        """Returns the tensors that replaced them in the host."""
        return ()

    @abstractmethod
    def changed(self, there: Collection[nn.Module]) -> Iterator[str]:
        """Yields the paths of tensors that have changed since the merge; `there` are the modules of the host."""

    @abstractmethod
    def undo(self, journal: Journal, holders: Holders, predict: Predict) -> Iterable[Tensor]:
        """Restore the original values. Returns the tensors that were put back into the host; it is empty if values were
        written into the host's own tensors.

        Raises:
            MergeError: an original tensor cannot be computed exactly from its record.
        """


@dataclass(eq=False)
class Replaced(MergeWrite):
    """A tensor of the host that the merge replaced by a new one, in all modules that hold it."""

    key: Key
    holders: list[Holder]
    tensor: Tensor
    original: OriginalTensor | None
    """The original tensor as it was kept; None if the host had no tensor there."""
    fingerprint: Fingerprint

    def __post_init__(self) -> None:
        self.added = self.tensor.detach().clone() if self.original is None else None

    def _stands(self, here: Tensor) -> bool:
        """Whether a tensor still has the values that the merge wrote. A tensor that the host lacked before may also
        have been cast since, as bitsandbytes casts biases, because `undo` only removes it."""
        if _is(here, self.fingerprint):
            return True
        return self.added is not None and not here.is_meta and torch.equal(here, self.added.to(here))

    def put(self, journal: Journal) -> None:
        """Replace the tensor by the new one."""
        for _, module, name in self.holders:
            journal.set(module, name, self.tensor)  # some modules (nn.RNN) keep more in step

    def outgoing(self) -> Iterable[Tensor]:
        there = None if self.original is None else self.original.tensor
        return () if there is None else (there,)

    def incoming(self) -> Iterable[Tensor]:
        return (self.tensor,)

    def changed(self, there: Collection[nn.Module]) -> Iterator[str]:
        seen: dict[int, bool] = {}
        for path, module, name in self.holders:
            here = None if computation(module, name) is not None else held(module, name)
            if here is not None and id(here) not in seen:
                seen[id(here)] = self._stands(here)
            if here is None or not seen[id(here)] or module not in there:
                yield f"{path}.{name}".lstrip(".")

    def undo(self, journal: Journal, holders: Holders, predict: Predict) -> Iterable[Tensor]:
        _, module, name = self.holders[0]
        now = held(module, name)
        assert now is not None
        old = None if self.original is None else brought_back(self.original, now, lambda: predict(self.key, now))
        if old is None and self.original is not None:
            raise MergeError(
                f"{'.'.join(self.key)}: the record of the merge does not fit any more, because an operator changed "
                "after the merge; reload the base model"
            )
        holding = (*self.holders, *holders.get(id(self.tensor), ()))  # also what was tied to it since
        for _, module, name in {(id(each[1]), each[2]): each for each in holding}.values():
            journal.set(module, name, old)
        return () if old is None else (old,)


@dataclass(eq=False)
class Overwritten(MergeWrite):
    """A tensor whose values the merge overwrites, because other code manages the tensor object. FSDP2, for example,
    restores its own tensors before each forward."""

    key: Key
    tensor: Tensor
    values: Tensor
    """A copy of the original values."""

    def put(self, journal: Journal, new: Tensor) -> None:
        """Write the new values."""
        journal.write(self.tensor.data, new, before=self.values)
        self.fingerprint = fingerprint(_mine(self.tensor))

    def changed(self, there: Collection[nn.Module]) -> Iterator[str]:
        if not _is(_mine(self.tensor), self.fingerprint):
            yield ".".join(self.key)

    def undo(self, journal: Journal, holders: Holders, predict: Predict) -> Iterable[Tensor]:
        journal.write(self.tensor.data, self.values)
        return ()


@dataclass(eq=False)
class QuantizedLayerWrite(MergeWrite):
    """A quantized layer that was made dense, or packed again."""

    key: Key
    module: nn.Module
    journal: Journal
    """Undoes the change: restores the layer with its quantized codes."""

    def __post_init__(self) -> None:
        weight = self._weight()
        self.fingerprint, self.device = fingerprint(weight), weight.device

    def _weight(self) -> Tensor:
        weight = layer_of(self.module, "weight").read(self.module, "weight")
        assert weight is not None
        return weight

    def changed(self, there: Collection[nn.Module]) -> Iterator[str]:
        weight = self._weight()
        same = weight.device == self.device and _is(weight, self.fingerprint)
        if not same or self.module not in there:
            yield ".".join(self.key)

    def undo(self, journal: Journal, holders: Holders, predict: Predict) -> Iterable[Tensor]:
        self.journal.undo(journal)
        return ()


@dataclass(eq=False)
class Folded(MergeWrite):
    """A computed tensor (a parametrization) that the merge replaced by a plain parameter."""

    key: Key
    module: nn.Module
    tensors: Mapping[str, Tensor]
    """The tensors that the module holds since the merge, by name."""
    sources: tuple[nn.Parameter, ...]
    """The parameters from which it was computed."""
    journal: Journal
    """Undoes the change: restores the computation of the tensor."""

    def __post_init__(self) -> None:
        self.fingerprints = {name: fingerprint(tensor) for name, tensor in self.tensors.items()}

    def outgoing(self) -> Iterable[Tensor]:
        return self.sources

    def incoming(self) -> Iterable[Tensor]:
        return self.tensors.values()

    def changed(self, there: Collection[nn.Module]) -> Iterator[str]:
        path, module = owner_path(self.key), self.module
        for name, expected in self.fingerprints.items():
            here = None if computation(module, name) is not None else held(module, name)
            if here is None or not _is(here, expected) or module not in there:
                yield f"{path}.{name}".lstrip(".")

    def undo(self, journal: Journal, holders: Holders, predict: Predict) -> Iterable[Tensor]:
        self.journal.undo(journal)
        return self.sources


def _is(tensor: Tensor, expected: Fingerprint) -> bool:
    same = tensor.dtype == expected[0] and tensor.shape == expected[1] and not tensor.is_meta
    return same and fingerprint(tensor) == expected


def _mine(tensor: Tensor) -> Tensor:
    """Returns the piece of a tensor that this process holds."""
    return tensor.to_local() if is_cut(tensor) else tensor  # type: ignore[attr-defined]
