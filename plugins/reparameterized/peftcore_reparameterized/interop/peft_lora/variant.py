"""`LoRAVariant`, the base class of variants of peft's LoRA: what makes one of our methods out of a file of type LORA.

Options of peft mark a variant in a file, and the name of our method when one is written. What a variant does not
define is as in plain LoRA.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from torch import Size, Tensor

from peftcore.author.formats import Found, Keys, Place


class LoRAVariant:
    """One variant of peft's LoRA."""

    reads: ClassVar[str] = ""
    """Our method that a marked file is read as."""
    writes: ClassVar[tuple[str, ...]] = ()
    """Our methods that are written so."""
    below: ClassVar[tuple[str, ...]] = ()
    """Names of its tensors below a module, besides A and B."""
    starts: ClassVar[tuple[str, ...]] = ("gaussian", "eva", "orthogonal", "lora_ga", "mini_lora")
    """The values of peft's `init_lora_weights` that it may have; those of plain LoRA say how training began alone."""
    has_scaling: ClassVar[bool] = True
    """Whether our method has the option `scaling`; for one without, alpha is multiplied by what rsLoRA changes."""
    has_bias: ClassVar[bool] = False
    """Whether B can have a bias."""
    times: ClassVar[int] = 1
    """How many times its rank it is written with."""

    def marked(self, keys: Keys) -> bool:
        """Whether peft's options mark this variant; it takes no others than those that do.

        Raises:
            CheckpointError: they have values of another type.
        """
        return False

    def options(self, keys: Keys, shapes: Mapping[str, Size], common: Mapping[str, Any]) -> dict[str, Any]:
        """Returns our options of a marked file, from those that all variants have in common, and those of its own.

        Args:
            shapes: of the tensors at one module, by name below it.
            common: method, rank, alpha, dropout, and scaling where our method has it.

        Raises:
            CheckpointError: our method cannot compute them.
        """
        return dict(common)

    def changes(self, keys: Keys, paths: Collection[str]) -> dict[str, dict[str, Any]]:
        """Returns other values of peft's options for some modules of a marked file, by path in the file.

        Raises:
            CheckpointError: peft has none for a path.
        """
        return {}

    def differs(self, place: Place) -> str:
        """Returns the reason why peft computes something else at a place; empty where it does not."""
        return ""

    def shapes(self, place: Place) -> tuple[Size, Size]:
        """Returns the shapes of A and B that a file has for a place: [*batch, rank, in, *kernel], [*batch, out, rank].

        Raises:
            CheckpointError: peft has no such layer.
        """
        return place.operator.A.shape, place.operator.B.shape

    def read(self, place: Place, found: Found, factors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns one operator's tensors by our names, from ``"A"`` and ``"B"`` and those of its own."""
        return factors

    def write_options(self, config: Any) -> dict[str, Any]:
        """Returns peft's options for one place, besides those that all variants have in common."""
        return {}

    def write_options_of_all(self, places: Sequence[Place]) -> dict[str, Any]:
        """Returns options that the file has once, from all places.

        Raises:
            ExportError: they differ where peft has one for all.
        """
        return {}

    def factors(self, place: Place) -> tuple[Tensor, Tensor]:
        """Returns A and B as they are written."""
        return place.operator.A.detach(), place.operator.B.detach()

    def write(self, place: Place) -> dict[str, Tensor]:
        """Returns one operator's tensors by peft's names, besides A and B."""
        return {}
