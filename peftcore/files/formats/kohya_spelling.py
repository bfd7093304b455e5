"""Finds a host's modules by their paths in files of kohya, which have underscores instead of dots."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from peftcore.errors import HostMismatch
from peftcore.files.formats.original_names import OriginalModule
from peftcore.registry.plugins import layer_of


class Spelling:
    """Finds a host's modules by path, or by their names in the model's original code. Dots and underscores are treated
    as equal."""

    def __init__(self, modules: Mapping[str, nn.Module], originals: Mapping[str, OriginalModule] = {}) -> None:
        self.modules = modules
        self.meant: dict[str, list[OriginalModule]] = {}
        for path in modules:
            self.meant.setdefault(path.replace("_", "."), []).append(OriginalModule((path,)))
        self.meant |= {name.replace("_", "."): [original] for name, original in originals.items()}

    @property
    def places(self) -> dict[str, str]:
        """Maps each spelling of a path to the first module with this spelling. `only` also checks that no second module
        has the same spelling."""
        return {spelling: meant[0].paths[0] for spelling, meant in self.meant.items()}

    def only(self, path: str) -> OriginalModule:
        """Returns the only module with a weight whose path is spelled like `path`.

        Raises:
            HostMismatch: several modules have this spelling.
        """
        meant = self.meant[path.replace("_", ".")]
        if len(meant) > 1:
            weighty = [each for each in meant if self.has_weight(each.paths[0])]
            if len(weighty) > 1:
                several = " and ".join(each.paths[0] for each in weighty)
                raise HostMismatch(f"{several} have the same name with underscores for dots")
            meant = weighty or meant
        return meant[0]

    def has_weight(self, path: str) -> bool:
        """True if the host's module has a weight."""
        return layer_of(self.modules[path], "weight").has(self.modules[path], "weight")
