"""Modules of equal structure, such as the blocks of a transformer or the experts of a layer. They have equal roles, so
only a few of a hundred blocks are surveyed, and the map is expanded to all blocks afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.layers.adapter_modules import ADAPTER_MODULES
from peftcore.layers.layer import SLOT
from peftcore.roles import vocabulary as V

NUMBERS = frozenset({"layer_idx", "layer_id", "layer_number", "layer_index", "block_idx", "index", "idx"})
"""Attributes in which the elements of a list store their index."""
TORCHS = frozenset(vars(nn.Module()))
"""Attributes of torch itself: tensors, children, and hooks."""
WORTH = (bool, int, float, str, torch.dtype, torch.device, torch.Size, type(None))
"""Types of attributes that are compared by value."""
Form = tuple[type[Tensor] | None, torch.Size, torch.dtype]
"""Type, shape and dtype of a tensor. The type is None for tensors of special subclasses, which never count as alike."""
Run = list[tuple[str, nn.Module, list[int]]]
"""Elements of a list of modules. Each has its name, its module, and the ids of the modules inside it that the first
element does not share."""


class Structure:
    """The structure of a module: its class, its attributes, its children, and shapes and dtypes of its tensors, but
    neither their values nor its place in a list."""

    def __init__(self, module: nn.Module) -> None:
        own = vars(module)
        names = own.keys() - {SLOT}
        self._class, self._count = type(module), len(names)
        self._attributes = [(name, own[name]) for name in names - TORCHS - NUMBERS]
        self._tensors = [(table, _forms(own[table])) for table in ("_parameters", "_buffers")]
        parts = {name: part for name, part in module._modules.items() if name != ADAPTER_MODULES}
        self._parts = [(name, part, None if part is None else Structure(part)) for name, part in parts.items()]
        inside = [structure for _, _, structure in self._parts if structure is not None]
        self.modules: set[int] = {id(module)}.union(*(structure.modules for structure in inside))
        """The ids of the module and of all its parts."""
        self.has_table: bool = _is_table(module) or any(structure.has_table for structure in inside)
        """Whether the module contains an embedding table. Tables of equal structure may be used for different inputs,
        which the structure does not show."""

    def fits(self, other: nn.Module, met: list[int] | None = None) -> bool:
        """Whether another module has this structure. Its tensors must be of torch's own classes. Its attributes must be
        equal numbers or names, or the same objects. The ids of the other module and of the modules inside it are added
        to `met`, except those of modules that both share."""
        own = vars(other)
        if type(other) is not self._class or len(own) - (SLOT in own) != self._count:
            return False
        for name, value in self._attributes:
            second = own.get(name, self)
            if second is not value and not _equal(second, value):
                return False
        for table, forms in self._tensors:
            tensors = own[table]
            if len(tensors) != len(forms):
                return False
            for name, form in forms:
                tensor = tensors.get(name, self)
                if tensor is None or form is None:
                    if tensor is not None or form is not None:
                        return False
                elif type(tensor) is not form[0] or tensor.dtype is not form[2] or tensor.shape != form[1]:
                    return False
        if met is not None:
            met.append(id(other))
        parts = own["_modules"]
        if len(parts) - (ADAPTER_MODULES in parts) != len(self._parts):
            return False
        for name, part, structure in self._parts:
            second = parts.get(name, self)
            if second is not part and (second is None or structure is None or not structure.fits(second, met)):
                return False
        return True


def _forms(tensors: Mapping[str, Tensor | None]) -> list[tuple[str, Form | None]]:
    """Returns forms of tensors by name."""
    return [(name, None if each is None else _form(each)) for name, each in tensors.items()]


def _form(tensor: Tensor) -> Form:
    if type(tensor) in (Tensor, nn.Parameter):
        return type(tensor), tensor.shape, tensor.dtype
    return None, torch.Size(), tensor.dtype


def _equal(value: Any, second: Any) -> bool:
    """Whether two attributes are the same numbers, names or sequences of these."""
    if type(value) is not type(second):
        return False
    if type(value) in (tuple, list):
        return len(value) == len(second) and all(map(_equal, value, second))
    return type(value) in WORTH and bool(value == second)


def runs(elements: Run, taken: Callable[[int], bool]) -> Iterator[Run]:
    """Yields runs of consecutive list elements with equal structure. An element begins a new run if it contains a
    table, or if one of its modules is `taken` or occurs in two places. Modules that it shares with the first element of
    the run are exempt."""
    run: Run = []
    structure: Structure | None = None
    met: set[int] = set()
    for each in elements:
        _, element, modules = each
        if len(run) == 1 and type(element) is type(run[0][1]) and element._modules:
            structure = Structure(run[0][1])
            met = structure.modules.copy()
        goes_on = structure is not None and not structure.has_table and structure.fits(element, modules)
        if goes_on and _are_apart(modules, met) and not any(map(taken, modules)):
            met.update(modules)
            run.append(each)
        else:
            if run:
                yield run
            run, structure = [each], None
    if run:
        yield run


def _are_apart(modules: list[int], met: set[int]) -> bool:
    return len(set(modules)) == len(modules) and met.isdisjoint(modules)


def _is_table(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return isinstance(module, nn.Embedding) or bool(module._parameters and V.TABLE_CLASS.search(name))
