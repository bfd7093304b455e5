"""The base class by which a plugin translates one method for files of kohya and LyCORIS, and the arguments of its
methods.

A file can have one module for several of the host's, whose outputs are concatenated: q, k and v of Flux. A
method says by `rows` and `factors` which of its tensors are cut there, and how those of several become one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Size, Tensor

from peftcore.errors import CheckpointError, ExportError
from peftcore.files.formats.file_tensors import Found
from peftcore.files.formats.translated_operators import Place
from peftcore.registry.plugins import imported, named_places

ALPHA = "alpha"
VECTORS = "vectors"
"""The vectors of all words, ``[vectors, width]``, which in the file are a tensor for each word."""


@dataclass(frozen=True)
class Held:
    """The tensors that a file has for one module."""

    shapes: Mapping[str, Size]
    """Shapes of its tensors by their names below the module, without alpha."""
    given: float | None
    """The value of alpha, where there is one."""
    weight: Size
    """The logical shape of the host's weight: ``[out, in, *kernel]``."""
    where: str
    """The file and the module's name in it, for messages."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """The values of its tensors that are one number, by their names below the module."""
    bias: bool = False
    """Whether the host's module has a bias."""
    tokens: Sequence[tuple[str, int]] = ()
    """At a table of tokens: the word and the id of each vector of new words, which are ``VECTORS``."""

    def size(self, name: str, dim: int) -> int:
        """Returns the size of a tensor in one dimension; 1 where it is missing: the file is refused later."""
        shape = self.shapes.get(name, ())
        return shape[dim] if dim < len(shape) and shape[dim] else 1

    def alpha(self, rank: int) -> float:
        """Returns alpha, which is the rank if the file does not contain it.

        Raises:
            CheckpointError: it is not above zero.
        """
        if self.given is not None and not (self.given > 0 and math.isfinite(self.given)):
            raise CheckpointError(f"{self.where}: alpha is {self.given}, and must be a finite number above 0")
        return float(rank if self.given is None else self.given)


@dataclass(frozen=True)
class Piece:
    """The tensors and the alpha that a file has for one module."""

    alpha: float | None
    """The module's alpha; None if the file does not contain it."""
    tensors: Mapping[str, Tensor]
    """The module's other tensors, by their names below it."""


class KohyaMethod(ABC):
    """The translation of one method between these files and ours."""

    methods: ClassVar[tuple[str, ...]]
    """Our methods that it can hold; the first is the one that is read."""
    below: ClassVar[tuple[str, ...]]
    """Names of its tensors below a module, without alpha."""
    telling: ClassVar[tuple[str, ...]]
    """The names of which a file of this method has at least one."""
    tensors: ClassVar[tuple[str, ...]] = ("weight",)
    """The host's tensors of a module that it changes."""
    beside: ClassVar[Mapping[str, str]] = {}
    """Tensors that can occur next to its own and are added to others of the host's module: their names, and those of
    the host's tensors, which are then trained along."""
    rows: ClassVar[tuple[str, ...]] = ()
    """Names of its tensors that have the module's outputs first, where each output is computed by itself from these and
    the other tensors. Without any it cannot be at one module of the file that is several modules of the host."""
    factors: ClassVar[tuple[str, str] | None] = None
    """The names of two tensors that act as the product of the second, which is in `rows`, with the first, times alpha /
    rank; None: no such two."""
    dropouts: ClassVar[tuple[str, ...]] = ()
    """The dropouts of its training that our method has as well, by our names, which are those of the header."""

    @abstractmethod
    def options(self, held: Held) -> dict[str, Any]:
        """Returns our options for one module.

        Raises:
            CheckpointError: ours cannot compute it.
        """

    @abstractmethod
    def outputs(self, shapes: Mapping[str, Size]) -> int:
        """Returns the number of outputs of a module, from the shapes of its tensors; -1 where the shapes do not
        determine it."""

    @abstractmethod
    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        """Returns one operator's tensors by our names."""

    @abstractmethod
    def write(self, place: Place) -> tuple[float | None, dict[str, Tensor]]:
        """Returns alpha, or None if the file has no alpha, and one operator's tensors by the file's names.

        Raises:
            ExportError: the file cannot hold it.
        """

    def tokens(self, place: Place) -> Sequence[tuple[str, int]]:
        """Returns the word and the id of each vector, in a method that writes the ``VECTORS`` of new words.

        Raises:
            ExportError: the words have no names.
        """
        return ()

    def writes(self, place: Place) -> bool:
        """Whether it can hold the effect of one of its methods at a place. If no translation can, `write` of the last
        one raises the reason."""
        return True

    def reads(self, shapes: Mapping[str, Size]) -> bool:
        """Whether a module's tensors, of these shapes by their names below it, are of this method."""
        names = set(shapes) - {ALPHA}
        return names <= set(self.below) and not names.isdisjoint(self.telling)

    def fits(self, held: Held) -> bool:
        """Whether it reads what the file has for a module of the host: where several methods of ours share the names of
        theirs, one of them."""
        return self.reads(held.shapes)

    def cut(self, piece: Piece, sizes: Sequence[int]) -> list[Piece | None]:
        """Returns the effect at each of several modules, whose outputs, `sizes` of them, are concatenated in `piece`;
        None where it leaves a module as it is.

        Factors whose ranks belong to one module each, as `joined` writes them, are cut there too: with as many ranks
        for each in their order, as sd-scripts writes them, or with at least one that is not zero.

        Raises:
            CheckpointError: its tensors do not have these outputs, or cannot be cut.
        """
        held = piece.tensors
        wrong = [name for name in self.rows if name in held and held[name].shape[:1] != (sum(sizes),)]
        if held.keys().isdisjoint(self.rows) or wrong:
            shown = ", ".join(f"{name} {tuple(value.shape)}" for name, value in held.items())
            raise CheckpointError(f"{shown} cannot be split into modules with {', '.join(map(str, sizes))} outputs")
        cuts = {name: torch.split(held[name], list(sizes)) for name in self.rows if name in held}
        parts = [
            Piece(piece.alpha, {**held, **{name: each[index] for name, each in cuts.items()}})
            for index in range(len(sizes))
        ]
        owners = _owners(parts, *self.factors) if self.factors and held.keys() >= set(self.factors) else None
        if owners is None or (held.keys() != set(self.factors or ()) and not all(map(len, owners))):
            return list(parts)
        return [self._ranks(part, own) if len(own) else None for part, own in zip(parts, owners, strict=True)]

    def _ranks(self, part: Piece, own: Tensor) -> Piece:
        first, second = self.factors or ("", "")
        alpha = None if part.alpha is None else part.alpha * len(own) / len(part.tensors[first])
        factors = {first: part.tensors[first][own], second: part.tensors[second][:, own]}
        return Piece(alpha, {**part.tensors, **factors})

    def swapped(self, piece: Piece) -> Piece:
        """Returns the effect at a module whose outputs are in two halves, with the halves swapped."""
        rows = {name: piece.tensors[name] for name in self.rows if name in piece.tensors}
        halves = {name: torch.cat(list(reversed(value.chunk(2)))) for name, value in rows.items()}
        return Piece(piece.alpha, {**piece.tensors, **halves})

    def joined(self, parts: Sequence[Piece | None], sizes: Sequence[int]) -> Piece:
        """Returns the effect at several modules as one module whose outputs are concatenated; None means a module, of
        so many outputs, that it leaves as it is.

        Factors are block-diagonal, each module's ranks next to those of the others, if they do not share the first.

        Raises:
            ExportError: that is not such a module.
        """
        held = [part for part in parts if part is not None]
        names = {name for part in held for name in part.tensors}
        shared = names.difference(self.rows)
        same = all(
            part.alpha == held[0].alpha and part.tensors.keys() == names
            and all(torch.equal(part.tensors[name], held[0].tensors[name]) for name in shared)
            for part in held
        )  # fmt: skip
        if names.intersection(self.rows) and same and len(held) == len(parts):
            rows = {name: torch.cat([part.tensors[name] for part in held]) for name in names.intersection(self.rows)}
            return Piece(held[0].alpha, {**held[0].tensors, **rows})
        factors = set(self.factors or ())
        beside = factors and factors <= names <= factors.union(self.rows)
        alike = all(part.tensors.keys() == names for part in held)
        if not beside or not alike or (len(held) < len(parts) and names != factors):
            shown = ", ".join(sorted(shared - factors or names - factors or names))
            raise ExportError(f"all of these modules must have the same {shown}")
        return self._blocks(parts, sizes, held)

    def _blocks(self, parts: Sequence[Piece | None], sizes: Sequence[int], held: Sequence[Piece]) -> Piece:
        first, second = self.factors or ("", "")
        ranks = [len(part.tensors[first]) for part in held]
        scales = [1.0 if part.alpha is None else part.alpha / rank for part, rank in zip(held, ranks, strict=True)]
        scale = scales[0] if len(set(scales)) == 1 else 1.0
        like = held[0].tensors[second]
        above = like.new_zeros(sum(sizes), sum(ranks), *like.shape[2:])
        row = column = index = 0
        for part, size in zip(parts, sizes, strict=True):
            if part is not None:
                rank, factor = ranks[index], scales[index] / scale
                above[row : row + size, column : column + rank] = part.tensors[second].detach() * factor
                column, index = column + rank, index + 1
            row += size
        beside = [name for name in self.rows if name != second and name in held[0].tensors]
        rows = {name: torch.cat([part.tensors[name] for part in held]) for name in beside}
        below = torch.cat([part.tensors[first] for part in held])
        return Piece(scale * sum(ranks), {**rows, first: below, second: above})


def _owners(parts: Sequence[Piece], first: str, second: str) -> list[Tensor] | None:
    """Returns the ranks of each module where each rank acts at one of them alone; None where they are shared."""
    shape, below = parts[0].tensors[first].shape, [part.tensors[second] for part in parts]
    rank = shape[0] if len(shape) > 1 else 0
    if not rank or any(each.dim() < 2 or each.shape[1] != rank for each in below):
        return None
    acting = torch.stack([(each != 0).transpose(0, 1).flatten(1).any(1) for each in below])
    if rank % len(parts) == 0:
        even = torch.arange(len(parts)).repeat_interleave(rank // len(parts))
        here = [even == index for index in range(len(parts))]
        if not (acting & ~torch.stack(here)).any():
            return [each.nonzero()[:, 0] for each in here]
    return [each.nonzero()[:, 0] for each in acting] if bool((acting.sum(0) == 1).all()) else None


def spelled(shape: Sequence[int]) -> list[tuple[int, ...]]:
    """Returns the shapes that a matrix [a, b] may have in a file: pointwise convolutions are written as they are, or
    flat."""
    if math.prod(shape[2:]) != 1:
        return [tuple(shape)]
    flat = tuple(shape[:2])
    return [tuple(shape), flat, *((*flat, *[1] * count) for count in (1, 2, 3))]


def added(methods: Sequence[KohyaMethod], shapes: Mapping[str, Size]) -> Mapping[str, str]:
    """Returns those of a module's tensors that are added to the host's, with these, where the others are of a method
    that has such beside its own."""
    if any(method.reads(shapes) for method in methods):
        return {}
    for method in methods:
        held = {leaf: tensor for leaf, tensor in method.beside.items() if leaf in shapes}
        if held and method.reads({leaf: shape for leaf, shape in shapes.items() if leaf not in held}):
            return held
    return {}


def method_of(methods: Sequence[KohyaMethod], shapes: Mapping[str, Size]) -> KohyaMethod | None:
    """Returns the first method of which a module's tensors are, without those that are added to the host's."""
    beside = added(methods, shapes)
    own = {leaf: shape for leaf, shape in shapes.items() if leaf not in beside}
    return next((method for method in methods if method.reads(own)), None)


def kohya_methods() -> list[KohyaMethod]:
    """Returns the translations of the installed plugins, the simplest first."""
    places = named_places("peftcore_translations", "translation")
    found: list[KohyaMethod] = [imported(places[name])() for name in sorted(places) if name.startswith("kohya/")]
    return sorted(found, key=lambda method: len(method.below))
