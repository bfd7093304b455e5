"""`PeftMethod`, the translation between one of our methods and one type of peft.

The plugin of our method registers it under ``"peft/TYPE"`` in the hook `peftcore_translations`; one that adds a variant
to another's type registers it under ``"peft/TYPE/NAME"``.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Size, Tensor, nn

from peftcore.errors import CheckpointError, ExportError, shown
from peftcore.files.envelope import SavedSite
from peftcore.files.formats.file_options import Keys
from peftcore.files.formats.file_tensors import Found
from peftcore.files.formats.patterns import matching
from peftcore.files.formats.peft_layers import is_one_of, not_added
from peftcore.files.formats.peft_module_names import PREFIXES, Group, modules_meant
from peftcore.files.formats.translated_operators import Place
from peftcore.registry.plugins import imported, named_places


class PeftMethod(ABC):
    """Base class of translations between one of our methods and one type of peft."""

    methods: tuple[str, ...]
    """Our methods that it can hold; the first is the one that is read."""
    below: tuple[str, ...] = ()
    """Names of its tensors below a module: ``"lora_A.weight"``."""
    root: ClassVar[tuple[str, ...]] = ()
    """Names of its tensors that belong to the adapter as a whole; a name that ends with a dot is a beginning."""
    beside: ClassVar[Mapping[str, str]] = {}
    """Names of its tensors in a file of another type, by their names in one of its own."""
    stem: ClassVar[str] = PREFIXES[0]
    """The prefix of the host's paths."""
    kinds: ClassVar[tuple[type, ...]] = ()
    """Layers that peft adapts with it: classes of modules, or of our layers; where there is none, it is not checked."""
    adds: ClassVar[bool] = False
    """Whether peft adds an update's output to the layer's: layers are refused where the output with the updated weight,
    which is ours, is another."""
    bias: ClassVar[str] = ""
    """The value of the option `bias` with which biases of adapted modules train, in types that have the option."""
    ties: ClassVar[str] = ""
    """The option that keeps an embedding and its heads tied where they train along; empty in types without one."""
    trained_beside: ClassVar[bool] = True
    """Whether its files can have modules and token tables of the host that train along."""
    folders: ClassVar[str] = ""
    """The option in which a file names the folders of other adapters, by name; empty if it uses no other adapters.
    These adapters are the parts of our method, each a part of its name."""
    part_kinds: ClassVar[tuple[str, ...]] = ()
    """The types of peft that they can be."""
    patterns: ClassVar[Mapping[str, str]] = {}
    """Options that hold values by pattern of path, and the option that each of them changes."""
    advice: ClassVar[Mapping[str, str]] = {}
    """What to write in peftcore for options of this type, ``{"init_r": "use rank="}``, shown to users who write peft's
    name; options that many types share have advice in the core."""

    @abstractmethod
    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        """Returns our options with "method", from peft's and from shapes of the tensors at one place, by `below` or
        `root`.

        Raises:
            CheckpointError: our method cannot compute the options, or they do not fit the shapes.
        """

    def changes(self, keys: Keys, paths: Collection[str]) -> dict[str, dict[str, Any]]:
        """Returns other values of peft's options for some places, by path in the file: `options` gets them there.

        Raises:
            CheckpointError: a pattern is not a regular expression, or takes too long; or a value is not valid for this
                type.
        """
        found: dict[str, dict[str, Any]] = {}
        for key, changed in self.patterns.items():
            left = set(paths)
            for pattern, value in keys.table(key).items():  # the first that matches counts
                hit = matching(pattern, left, keys.where, endings=True)
                left -= hit
                for path in hit:
                    found.setdefault(path, {})[changed] = value
        return found

    def meant(self, keys: Keys, paths: Collection[str]) -> set[str] | None:
        """Returns the modules that the options target, of those at `paths`; None where they do not say."""
        return modules_meant(keys, paths)

    def own(self, groups: Sequence[Group], model: nn.Module, read: Callable[[str], Tensor]) -> list[Group]:
        """Returns the places of the file that our method has as well. A place that repeats another is left out, once it
        is verified to be equal."""
        return list(groups)

    def selections(self, keys: Keys, sites: Sequence[SavedSite], model: nn.Module) -> dict[str, tuple[SavedSite, ...]]:
        """Returns our method's selections, from the places that have tensors; none for a method that finds its place
        itself."""
        return {"": tuple(sites)} if self.below else {}

    def companions(self, keys: Keys, model: nn.Module) -> list[tuple[str, dict[str, Any]]]:
        """Returns other types of peft that the same file holds besides this one, with their options.

        Raises:
            CheckpointError: they cannot be understood.
        """
        return []

    def joined(self, others: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any] | None:
        """Returns the options by which a file of this type holds others, from theirs: the inverse of `companions`.

        None where it does not hold them.
        """
        return None

    def named(self, keys: Keys) -> dict[str, str]:
        """Returns the paths of the adapters that the file names in `folders`, by name.

        Raises:
            CheckpointError: they are not paths, or peft would not take them for these parts.
        """
        found = keys.table(self.folders) if self.folders else {}
        if strange := [name for name, path in found.items() if not isinstance(path, str)]:
            raise CheckpointError(f"{keys.where}: {self.folders!r} has {shown(found[strange[0]])}, which is no path")
        return found

    def parts_options(self, keys: Keys, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Returns our options of the parts, from the options of the adapters that the file names.

        Raises:
            CheckpointError: our method cannot compute them as parts.
        """
        return {"parts": list(parts)} if self.folders else {}

    def part_differs(self, options: Mapping[str, Any]) -> str:
        """Returns the reason why peft computes something else with a part that has these options of peft's, which is
        to be written as an adapter that the file names; empty where it does not."""
        return ""

    def trains(self, keys: Keys, path: str) -> tuple[str, ...]:
        """Returns the parameters below a module that are replaced besides, such as a bias."""
        return ()

    def differs(self, place: Place) -> str:
        """Returns the reason why peft computes something else at a place of a kind that it takes; empty where it does
        not. An adapter with such a place is neither read nor written."""
        return not_added(place.site) if self.adds else ""

    def check(self, place: Place, error: type[CheckpointError] | type[ExportError], where: str = "") -> None:
        """Refuse a place where peft computes something else.

        Raises:
            CheckpointError, ExportError: whichever is wanted.
        """
        if self.kinds and not is_one_of(place.site, self.kinds):
            known = ", ".join(each.__name__ for each in self.kinds)
            raise error(f"{where}{place.site.path} is none of what peft adapts so: {known}")
        if other := self.differs(place):
            raise error(f"{where}{place.site.path}: peft computes something else with {other}")

    @abstractmethod
    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        """Returns one operator's tensors by our names, from those at its module (or of the whole, for a method
        without).

        Raises:
            CheckpointError: their values cannot be ours.
        """

    def read_shared(self, name: str, module: nn.Module, found: Found) -> dict[str, Tensor]:
        """Returns the tensors of shared state by our names, from those of the whole adapter."""
        return {}

    def replaced(self, place: Place, config: Mapping[str, Any], found: Found) -> Tensor:
        """Returns the value of a parameter that `trains` named; `config` are our options."""
        raise NotImplementedError

    def pattern(self, path: str, paths: Collection[str]) -> str:
        """Returns a pattern that matches exactly one of all adapted modules.

        Raises:
            ExportError: none does.
        """
        return f"^{re.escape(path)}"

    def holds(self, config: Any) -> bool:
        """Whether this type is the one that has our method with these options, where several types have the method."""
        return True

    def write_options(self, config: Any) -> dict[str, Any]:
        """Returns peft's options from ours, for one place.

        Raises:
            ExportError: peft cannot compute them.
        """
        return {}

    def write_options_at(self, place: Place) -> dict[str, Any]:
        """Returns peft's options for one place, where these depend on the place; options left out do not matter there.

        Raises:
            ExportError: peft cannot compute it there.
        """
        return self.write_options(place.config)

    def write_options_of_all(self, places: Sequence[Place], model: nn.Module) -> dict[str, Any]:
        """Returns options that the file has once, from all operators and the host.

        Raises:
            ExportError: they differ where peft has one for all.
        """
        return {}

    def write(self, place: Place) -> dict[str, Tensor]:
        """Returns one operator's tensors by peft's names.

        Raises:
            ExportError: peft has no names for its tensors.
        """
        return {}

    def write_all(self, places: Sequence[Place]) -> dict[str, Tensor]:
        """Returns tensors that several operators share in the file, by peft's names.

        Raises:
            ExportError: the operators differ where the file has one tensor.
        """
        return {}

    def write_shared(self, name: str, module: nn.Module) -> dict[str, Tensor]:
        """Returns shared state by peft's names."""
        return {}


def peft_methods() -> dict[str, str]:
    """Returns peft's types that plugins can read, with the classes of their translations."""
    return {kind: place for kind, place in _named_below("peft/").items() if "/" not in kind}


def peft_variants(kind: str) -> dict[str, str]:
    """Returns the variants that plugins add to one type of peft, with their classes: the type's translation says what
    these are to be."""
    return _named_below(f"peft/{kind}/")


def _named_below(prefix: str) -> dict[str, str]:
    places = named_places("peftcore_translations", "translation")
    return {name.removeprefix(prefix): place for name, place in places.items() if name.startswith(prefix)}


def peft_method(kind: str, where: Path) -> PeftMethod:
    """Returns the translation of one type of peft.

    Raises:
        CheckpointError: no installed plugin reads it.
    """
    known = peft_methods()
    if kind not in known:
        raise CheckpointError(f"{where}: no installed plugin reads peft's {kind}; they read {', '.join(sorted(known))}")
    method: PeftMethod = imported(known[kind])()
    return method
