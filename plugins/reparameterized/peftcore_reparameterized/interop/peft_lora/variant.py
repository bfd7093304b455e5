"""`LoRAVariant`, the base class of variants of peft's LoRA. A variant translates files of type LORA to one method of
peftcore.

When a file is read, peft's options in it select the variant. When an adapter is written, the name of its method does.
Members that a variant does not define are as in plain LoRA.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from torch import Size, Tensor

from peftcore.author.formats import Found, Keys, Place


class LoRAVariant:
    """One variant of peft's LoRA."""

    reads: ClassVar[str] = ""
    """The method of peftcore to which a marked file is translated."""
    writes: ClassVar[tuple[str, ...]] = ()
    """The methods of peftcore that are written as this variant."""
    below: ClassVar[tuple[str, ...]] = ()
    """Names of the variant's tensors below a module, besides A and B."""
    starts: ClassVar[tuple[str, ...]] = ("gaussian", "eva", "orthogonal", "lora_ga", "mini_lora")
    """The accepted values of peft's `init_lora_weights`; those of plain LoRA describe only how training began."""
    has_scaling: ClassVar[bool] = True
    """Whether the method of peftcore has the option `scaling`. If not, alpha is multiplied by the factor of rsLoRA."""
    has_bias: ClassVar[bool] = False
    """Whether B can have a bias."""
    times: ClassVar[int] = 1
    """Rank in the file, as a multiple of the adapter's rank."""

    def marked(self, keys: Keys) -> bool:
        """Whether peft's options mark this variant. Only the options that decide this are read.

        Raises:
            CheckpointError: an option has a value of another type.
        """
        return False

    def options(self, keys: Keys, shapes: Mapping[str, Size], common: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the options of the peftcore method for a marked file: those that all variants share, and those of
        this variant.

        Args:
            shapes: the shapes of the tensors at one module, by name below it.
            common: method, rank, alpha, dropout, and scaling if `has_scaling` is True.

        Raises:
            CheckpointError: the method of peftcore does not support the options.
        """
        return dict(common)

    def changes(self, keys: Keys, paths: Collection[str]) -> dict[str, dict[str, Any]]:
        """Returns the options of peft that have other values for some modules of a marked file, by path in the file.

        Raises:
            CheckpointError: an option of peft is missing or contradictory for a path.
        """
        return {}

    def differs(self, place: Place) -> str:
        """Returns the reason why peft's output differs at a place, or an empty string."""
        return ""

    def shapes(self, place: Place) -> tuple[Size, Size]:
        """Returns the shapes of A and B that a file has for a place: [*batch, rank, in, *kernel], [*batch, out, rank].

        Raises:
            CheckpointError: peft does not support the layer.
        """
        return place.operator.A.shape, place.operator.B.shape

    def read(self, place: Place, found: Found, factors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns one operator's tensors by peftcore's names, from ``"A"``, ``"B"`` and the variant's tensors in the
        file."""
        return factors

    def write_options(self, config: Any) -> dict[str, Any]:
        """Returns peft's options for one place, besides those that all variants have in common."""
        return {}

    def write_options_of_all(self, places: Sequence[Place]) -> dict[str, Any]:
        """Returns those options that a file contains only once, computed from all places.

        Raises:
            ExportError: options differ between places where peft has a single value.
        """
        return {}

    def factors(self, place: Place) -> tuple[Tensor, Tensor]:
        """Returns A and B as they are written to a file."""
        return place.operator.A.detach(), place.operator.B.detach()

    def write(self, place: Place) -> dict[str, Tensor]:
        """Returns one operator's tensors by peft's names, besides A and B."""
        return {}
