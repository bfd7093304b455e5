"""`PeftMethod`, the base class of translations between a method of peftcore and an adapter type of peft.

The plugin of the method registers the translation under ``"peft/TYPE"`` in the hook `peftcore_translations`. A plugin
that adds a variant to a type of another plugin registers it under ``"peft/TYPE/NAME"``.
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
    """Base class of translations between a method of peftcore and an adapter type of peft, such as ``"LORA"``."""

    methods: tuple[str, ...]
    """Names of peftcore's methods that can be written as this type. Files are read as the first of them."""
    below: tuple[str, ...] = ()
    """Names of the type's tensors below a module: ``"lora_A.weight"``."""
    root: ClassVar[tuple[str, ...]] = ()
    """Names of the type's tensors that belong to the whole adapter, not to a module; a name that ends with a dot is a
    prefix."""
    beside: ClassVar[Mapping[str, str]] = {}
    """For files that contain two types, of which the other one is the main type. Maps the names of this type's tensors
    in files of this type alone to their names in such a file."""
    stem: ClassVar[str] = PREFIXES[0]
    """The prefix of the host's paths in the file."""
    kinds: ClassVar[tuple[type, ...]] = ()
    """The layers that peft adapts with this type: classes of modules, or peftcore's layer classes. If empty, layers are
    not checked."""
    adds: ClassVar[bool] = False
    """True if peft adds the output of the update to the output of the layer. peftcore uses the updated weight instead,
    so layers for which the two outputs differ are refused."""
    bias: ClassVar[str] = ""
    """The value of peft's option `bias` that trains the biases of adapted modules; empty for types without the
    option."""
    ties: ClassVar[str] = ""
    """The option of peft that keeps an embedding and its heads tied while they train; empty for types without such an
    option."""
    trained_beside: ClassVar[bool] = True
    """True if files of the type can contain modules and token tables of the host that train with the adapter."""
    folders: ClassVar[str] = ""
    """The option that lists the folders of other adapters by name; empty if the type uses no other adapters. The
    adapters become the parts of peftcore's method, with the same names."""
    part_kinds: ClassVar[tuple[str, ...]] = ()
    """The types of peft that the adapters in `folders` may have."""
    patterns: ClassVar[Mapping[str, str]] = {}
    """Options that map patterns of module paths to values, such as `rank_pattern`. Each is listed with the option whose
    value it changes."""
    advice: ClassVar[Mapping[str, str]] = {}
    """Hints for users who pass an option of peft to peftcore, keyed by the option's name: ``{"init_r": "use rank="}``.
    The core has the hints for options that many types share."""

    @abstractmethod
    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        """Returns the options of peftcore's method at one place, including its name under "method". They are translated
        from peft's options (`keys`), and from the shapes of the tensors at the place, whose names are in `below` or
        `root`.

        Raises:
            CheckpointError: peftcore's method cannot compute the same with these options, or they do not fit the
                shapes.
        """

    def changes(self, keys: Keys, paths: Collection[str]) -> dict[str, dict[str, Any]]:
        """Returns peft's options that patterns change for single modules, keyed by the module's path in the file.
        `options` is called with these values for these modules.

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
        """Returns the modules among `paths` that the options target; None if the options do not specify targets."""
        return modules_meant(keys, paths)

    def own(self, groups: Sequence[Group], model: nn.Module, read: Callable[[str], Tensor]) -> list[Group]:
        """Returns the modules in the file for which peftcore's method has its own tensors. Modules that peft stores as
        copies of another module are left out, after a check that the copies are equal."""
        return list(groups)

    def selections(self, keys: Keys, sites: Sequence[SavedSite], model: nn.Module) -> dict[str, tuple[SavedSite, ...]]:
        """Returns the selections of sites of peftcore's method, from the sites that have tensors in the file; empty for
        a method that chooses its sites itself."""
        return {"": tuple(sites)} if self.below else {}

    def companions(self, keys: Keys, model: nn.Module) -> list[tuple[str, dict[str, Any]]]:
        """Returns the name and the options of each other type of peft that the same file contains.

        Raises:
            CheckpointError: peftcore does not support the options for these types.
        """
        return []

    def joined(self, others: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any] | None:
        """Returns the options of a file of this type that also contains other types, from the options of each; None if
        this type cannot be combined with them. The inverse of `companions`."""
        return None

    def named(self, keys: Keys) -> dict[str, str]:
        """Returns the paths of the other adapters that the file lists in the option `folders`, keyed by the adapter's
        name.

        Raises:
            CheckpointError: the option does not contain paths, or peft would not use the adapters for these parts.
        """
        found = keys.table(self.folders) if self.folders else {}
        if strange := [name for name, path in found.items() if not isinstance(path, str)]:
            raise CheckpointError(f"{keys.where}: {self.folders!r} has {shown(found[strange[0]])}, which is not a path")
        return found

    def parts_options(self, keys: Keys, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Returns the option ``parts`` of peftcore's method. `parts` has peftcore's options of each adapter that the
        file lists.

        Raises:
            CheckpointError: peftcore's method cannot use these adapters as parts.
        """
        return {"parts": list(parts)} if self.folders else {}

    def part_differs(self, options: Mapping[str, Any]) -> str:
        """Returns the reason why peft and peftcore would compute different outputs with a part that has these options
        of peft; empty if the outputs are the same."""
        return ""

    def trains(self, keys: Keys, path: str) -> tuple[str, ...]:
        """Returns the names of parameters of an adapted module that the adapter also replaces, such as ``"bias"``."""
        return ()

    def differs(self, place: Place) -> str:
        """Returns the reason why peft and peftcore compute different outputs at a place; empty if the outputs are the
        same. It is called only for layers in `kinds`. An adapter with such a place is neither read nor written."""
        return not_added(place.site) if self.adds else ""

    def check(self, place: Place, error: type[CheckpointError] | type[ExportError], where: str = "") -> None:
        """Raise `error` if peft does not adapt the layer at a place, or computes other outputs there.

        Raises:
            CheckpointError, ExportError: as above; `error` is the class that is raised.
        """
        if self.kinds and not is_one_of(place.site, self.kinds):
            known = ", ".join(each.__name__ for each in self.kinds)
            raise error(f"{where}{place.site.path} is not a layer that peft adapts this way: {known}")
        if other := self.differs(place):
            raise error(f"{where}{place.site.path}: peft computes something else with {other}")

    @abstractmethod
    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        """Returns the tensors of one operator, keyed by their names in peftcore. They are read from the tensors of its
        module, or from those of the whole adapter if the method has no tensors at modules.

        Raises:
            CheckpointError: peftcore's method does not allow these values.
        """

    def read_shared(self, name: str, module: nn.Module, found: Found) -> dict[str, Tensor]:
        """Returns the tensors of the shared state `name`, keyed by their names in peftcore. They are read from the
        tensors of the whole adapter."""
        return {}

    def replaced(self, place: Place, config: Mapping[str, Any], found: Found) -> Tensor:
        """Returns the new value of a host's parameter that `trains` names. `config` has peftcore's options."""
        raise NotImplementedError

    def pattern(self, path: str, paths: Collection[str]) -> str:
        """Returns a pattern of peft that matches only `path` among the adapted modules.

        Raises:
            ExportError: there is no such pattern.
        """
        return f"^{re.escape(path)}"

    def holds(self, config: Any) -> bool:
        """True if peftcore's method with these options is written as this type. Several types may have the same method
        for different options."""
        return True

    def write_options(self, config: Any) -> dict[str, Any]:
        """Returns peft's options for one place, translated from peftcore's options.

        Raises:
            ExportError: peft cannot compute the same with any options.
        """
        return {}

    def write_options_at(self, place: Place) -> dict[str, Any]:
        """Returns peft's options for one place, by default those of `write_options`. Types whose options also depend on
        the site override this method. Options that have no effect at the site are left out.

        Raises:
            ExportError: peft cannot compute the same at this place.
        """
        return self.write_options(place.config)

    def write_options_of_all(self, places: Sequence[Place], model: nn.Module) -> dict[str, Any]:
        """Returns the options that have one value for the whole adapter, from all operators and the host.

        Raises:
            ExportError: operators differ in an option that has only one value in peft.
        """
        return {}

    def write(self, place: Place) -> dict[str, Tensor]:
        """Returns the tensors of one operator, keyed by peft's names.

        Raises:
            ExportError: peft has no names for its tensors.
        """
        return {}

    def write_all(self, places: Sequence[Place]) -> dict[str, Tensor]:
        """Returns tensors that several operators share in the file, keyed by peft's names.

        Raises:
            ExportError: the operators have different values for a tensor that the file contains only once.
        """
        return {}

    def write_shared(self, name: str, module: nn.Module) -> dict[str, Tensor]:
        """Returns the tensors of the shared state `name`, keyed by peft's names."""
        return {}


def peft_methods() -> dict[str, str]:
    """Returns the types of peft that installed plugins can read, each with the path of its translation's class."""
    return {kind: place for kind, place in _named_below("peft/").items() if "/" not in kind}


def peft_variants(kind: str) -> dict[str, str]:
    """Returns the variants that plugins add to one type of peft, each with the path of its class. The translation of
    the type defines their base class."""
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
