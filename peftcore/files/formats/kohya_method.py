"""`KohyaMethod`, the base class for translations of one method between peftcore and files of kohya and LyCORIS, and the
classes of its arguments.

One module of a file can be several modules of the host whose outputs are concatenated, such as q, k and v of Flux. The
attributes `rows` and `factors` determine which tensors are split when such a module is read, and how tensors are
combined when it is written.
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
"""The key of the tensor with the vectors of all new words, ``[vectors, width]``. The file has one tensor for each word
instead."""


@dataclass(frozen=True)
class Held:
    """The tensors that a file has for one module."""

    shapes: Mapping[str, Size]
    """Shapes of the tensors except alpha, keyed by the part of the name below the module."""
    given: float | None
    """The value of alpha; None if the file has none for the module."""
    weight: Size
    """The logical shape of the host's weight: ``[out, in, *kernel]``."""
    where: str
    """The file and the module's name in it, for error messages."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """The values of tensors that are single numbers, keyed by the part of the name below the module."""
    bias: bool = False
    """Whether the host's module has a bias."""
    tokens: Sequence[tuple[str, int]] = ()
    """For a token embedding with new words (``VECTORS``): the word and the token id for each vector."""

    def size(self, name: str, dim: int) -> int:
        """Returns the size of a tensor in one dimension; 1 if the tensor is missing, since the file is refused later
        anyway."""
        shape = self.shapes.get(name, ())
        return shape[dim] if dim < len(shape) and shape[dim] else 1

    def alpha(self, rank: int) -> float:
        """Returns alpha; the default is the rank if the file contains no alpha.

        Raises:
            CheckpointError: alpha is not a finite number above zero.
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
    """The module's tensors except alpha, keyed by the part of the name below the module."""


class KohyaMethod(ABC):
    """Base class of translations of one method between files of kohya or LyCORIS and peftcore."""

    methods: ClassVar[tuple[str, ...]]
    """Names of peftcore's methods that can be written this way. Files are read as the first of them."""
    below: ClassVar[tuple[str, ...]]
    """Names of the method's tensors in the file, below a module, without alpha."""
    telling: ClassVar[tuple[str, ...]]
    """The tensor names that identify the method. The tensors of a module belong to it only if at least one has such a
    name."""
    tensors: ClassVar[tuple[str, ...]] = ("weight",)
    """Names of the tensors of a host's module that the method can change."""
    beside: ClassVar[Mapping[str, str]] = {}
    """Maps the names of additional tensors in the file to names of tensors of the host's module. An additional tensor
    is added to the host's tensor, which then trains with the adapter."""
    rows: ClassVar[tuple[str, ...]] = ()
    """Names of tensors whose first dimension is the module's outputs, so that they can be split by outputs: each output
    depends only on its row of these tensors, and on the other tensors. If empty, the method cannot be used for a module
    of the file that is several modules of the host."""
    factors: ClassVar[tuple[str, str] | None] = None
    """The names (A, B) of the two factors if the method adds B A · alpha / rank; B has to be in `rows`. None for
    methods without such factors."""
    dropouts: ClassVar[tuple[str, ...]] = ()
    """Names of the dropout options that peftcore's method supports. The file's header uses the same names."""

    @abstractmethod
    def options(self, held: Held) -> dict[str, Any]:
        """Returns the options of peftcore's method for one module.

        Raises:
            CheckpointError: peftcore's method cannot compute the same.
        """

    @abstractmethod
    def outputs(self, shapes: Mapping[str, Size]) -> int:
        """Returns the number of outputs of a module from the shapes of its tensors; -1 if the shapes do not determine
        it."""

    @abstractmethod
    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        """Returns the tensors of one operator, read from the file, keyed by their names in peftcore."""

    @abstractmethod
    def write(self, place: Place) -> tuple[float | None, dict[str, Tensor]]:
        """Returns the alpha to write (None for no alpha), and the tensors of one operator, keyed by their names in the
        file.

        Raises:
            ExportError: the file cannot store the operator.
        """

    def tokens(self, place: Place) -> Sequence[tuple[str, int]]:
        """Returns the word and the token id for each vector, if the method writes ``VECTORS`` of new words; empty for
        other methods.

        Raises:
            ExportError: the words have no names.
        """
        return ()

    def writes(self, place: Place) -> bool:
        """True if the translation can write the operator at a place. If no translation of a method can write it, the
        error that `write` of the last translation raises gives the reason."""
        return True

    def reads(self, shapes: Mapping[str, Size]) -> bool:
        """True if a module's tensors belong to this method. `shapes` has the shapes of the tensors, keyed by the part
        of the name below the module."""
        names = set(shapes) - {ALPHA}
        return names <= set(self.below) and not names.isdisjoint(self.telling)

    def fits(self, held: Held) -> bool:
        """True if the translation reads the tensors that the file has for a module of the host. Translations that share
        the same names of tensors override it to choose one of them."""
        return self.reads(held.shapes)

    def cut(self, piece: Piece, sizes: Sequence[int]) -> list[Piece | None]:
        """Returns the tensors of one module, split among several modules of the host whose outputs are concatenated in
        it. There is one `Piece` for each module, or None for a module that `piece` does not change. `sizes` are the
        modules' numbers of outputs.

        If each rank of the factors belongs to one module only, as in files that `joined` writes, each module gets only
        its own ranks: an equal number of ranks in the order of the modules, as sd-scripts writes them, or the ranks
        that are nonzero only for that module.

        Raises:
            CheckpointError: the tensors do not have these outputs, or cannot be split.
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
        """Returns the tensors of a module with the first and second half of its outputs swapped."""
        rows = {name: piece.tensors[name] for name in self.rows if name in piece.tensors}
        halves = {name: torch.cat(list(reversed(value.chunk(2)))) for name, value in rows.items()}
        return Piece(piece.alpha, {**piece.tensors, **halves})

    def joined(self, parts: Sequence[Piece | None], sizes: Sequence[int]) -> Piece:
        """Returns the tensors of several modules combined into one module whose outputs are concatenated. A module
        without an adapter is None in `parts`. `sizes` are the modules' numbers of outputs.

        If the modules do not share their first factor, ranks are concatenated, and the second factor is block-diagonal.

        Raises:
            ExportError: the modules cannot be combined.
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
    """Returns the indices of each module's ranks, if each rank acts on only one module; None if modules share ranks."""
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
    """Returns the shapes that a tensor may have in a file: `shape` itself; for linear layers and pointwise convolutions
    also ``[a, b]``, alone or followed by one to three dimensions of size 1."""
    if math.prod(shape[2:]) != 1:
        return [tuple(shape)]
    flat = tuple(shape[:2])
    return [tuple(shape), flat, *((*flat, *[1] * count) for count in (1, 2, 3))]


def added(methods: Sequence[KohyaMethod], shapes: Mapping[str, Size]) -> Mapping[str, str]:
    """Returns a mapping from the names of a module's additional tensors (`KohyaMethod.beside`) to the host tensors to
    which they are added. It is empty unless the remaining tensors belong to a method that allows them."""
    if any(method.reads(shapes) for method in methods):
        return {}
    for method in methods:
        held = {leaf: tensor for leaf, tensor in method.beside.items() if leaf in shapes}
        if held and method.reads({leaf: shape for leaf, shape in shapes.items() if leaf not in held}):
            return held
    return {}


def method_of(methods: Sequence[KohyaMethod], shapes: Mapping[str, Size]) -> KohyaMethod | None:
    """Returns the first method to which a module's tensors belong, apart from additional ones (`added`); None if there
    is no such method."""
    beside = added(methods, shapes)
    own = {leaf: shape for leaf, shape in shapes.items() if leaf not in beside}
    return next((method for method in methods if method.reads(own)), None)


def kohya_methods() -> list[KohyaMethod]:
    """Returns the translations of the installed plugins, those with the fewest tensors first."""
    places = named_places("peftcore_translations", "translation")
    found: list[KohyaMethod] = [imported(places[name])() for name in sorted(places) if name.startswith("kohya/")]
    return sorted(found, key=lambda method: len(method.below))
