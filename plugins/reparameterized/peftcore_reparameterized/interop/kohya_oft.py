"""OFT and BOFT in files of LyCORIS, which calls them diag-oft and boft, and OFT in files of kohya's sd-scripts (checked
against LyCORIS 4.1).

Both libraries rotate the outputs of a weight, as peftcore does with ``side="outputs"``. ``oft_blocks`` contains a full
matrix X for each block, of which only the skew-symmetric Q = X - X^T is used. Its shape is [blocks, b, b] for OFT, and
[factors, blocks, b, b] for BOFT. ``rescale`` contains gains of the outputs, which peftcore's OFT has with the option
`rescaled`. In BOFT, LyCORIS rotates in the opposite direction to peftcore, and the coordinates of a block alternate
between its two halves.

``alpha`` is a constraint: Q is scaled down to a norm of at most alpha times the number of outputs. In LyCORIS, 0
disables the constraint. peftcore's OFT has the option `constraint` for it; BOFT has none. For BOFT, the constraint is
applied to K when a file is read, so that outputs are the same. Further training is not constrained.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Size, Tensor

from peftcore.author.formats import ALPHA, Found, Held, KohyaMethod, Place
from peftcore.errors import CheckpointError, ExportError

BLOCKS, RESCALE = "oft_blocks", "rescale"
CONSTRAINED = "oft_unet"
"""The prefix of names in files of sd-scripts. In these files, a constraint of 0 disables the rotation."""


class KohyaOFT(KohyaMethod):
    """Translates rotations in blocks."""

    methods = ("oft",)
    below = (BLOCKS, RESCALE)
    telling = (BLOCKS,)

    def reads(self, shapes: Mapping[str, Size]) -> bool:
        return super().reads(shapes) and len(shapes[BLOCKS]) == 3

    def options(self, held: Held) -> dict[str, Any]:
        limit = held.given if held.given is not None and 0 < held.given < math.inf else None
        turns = {"side": "outputs", "block_size": _width(held)}
        return turns | {"constraint": limit, "rescaled": RESCALE in held.shapes}

    def outputs(self, shapes: Mapping[str, Size]) -> int:
        held = shapes.get(BLOCKS, ())
        return held[-3] * held[-2] if len(held) >= 3 else -1

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        held = _skew(place, found, place.operator.K.shape)
        Q = held if place.config.constraint is not None else _within(held, place, found)
        return {"K": _above(Q)} | ({} if place.operator.gain is None else _gains(place, found))

    def write(self, place: Place) -> tuple[float, dict[str, Tensor]]:
        operator, config = place.operator, place.config
        _check_side(place)
        if config.series is not None:
            raise ExportError(
                f"LyCORIS has no Neumann series, which {place.site.path} uses; set series=None and train again"
            )
        blocks = place.site.out_features // operator.size
        free = config.constraint is None  # what eps limits is written as it counts, and this limit is in the file
        turned = _blocks(place, (operator.entries() if free else operator.K).expand(blocks, -1))
        return config.constraint or 0.0, {BLOCKS: turned} | ({} if operator.gain is None else _rescale(place))


class KohyaBOFT(KohyaOFT):
    """Translates butterfly factors with gains of the outputs."""

    methods = ("boft",)

    def reads(self, shapes: Mapping[str, Size]) -> bool:
        return KohyaMethod.reads(self, shapes) and len(shapes[BLOCKS]) == 4

    def options(self, held: Held) -> dict[str, Any]:
        size = _width(held)
        if held.given:
            warnings.warn(
                f"{held.where.rpartition(': ')[0]} was trained with a constraint (alpha = {held.given:g}), which boft "
                "does not apply: outputs are the same, but further training differs",
                UserWarning,
                stacklevel=2,
            )
        return {"side": "outputs", "block_size": size, "factors": held.size(BLOCKS, 0)}

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        Q = _within(_skew(place, found, place.operator.K.shape), place, found)
        return {"K": _above(-_reordered(Q, _by_halves(place.operator.size)))} | _gains(place, found)

    def write(self, place: Place) -> tuple[float, dict[str, Tensor]]:
        operator, outputs = place.operator, place.site.out_features
        _check_side(place)
        gains = _rescale(place)
        blocks = outputs // operator.size
        if len(operator.K) == 1 and operator.size <= blocks:
            return 0.0, {BLOCKS: _blocks(place, operator.K[0]), **gains}
        if blocks & (blocks - 1):
            raise ExportError(
                f"LyCORIS makes butterflies of 2^n blocks, and {place.site.path} has {outputs} outputs in {blocks}; "
                "set another block_size and train again"
            )
        turned = _reordered(-_upper(operator.K, operator.size), _in_turns(operator.size))
        turned = turned - turned.mT  # a reordered triangle has entries on both sides: they are put together above it
        more = blocks.bit_length() - len(turned)  # it always has all factors; those that ours lacks do not turn
        turned = torch.cat([turned, turned.new_zeros(more, *turned.shape[1:])])
        return 0.0, {BLOCKS: turned.triu(), **gains}


def _width(held: Held) -> int:
    """Return the width of a file's blocks.

    Raises:
        CheckpointError: blocks of this width cannot rotate.
    """
    size = held.size(BLOCKS, -1)
    if size < 2:
        raise CheckpointError(
            f"{held.where}: blocks of width {size} cannot rotate; remove the tensors of this module from the file"
        )
    return size


def _gains(place: Place, found: Found) -> dict[str, Tensor]:
    """Return the gains of the outputs, or ones if the file has no gains."""
    gain, ones = place.operator.gain.shape, [1] * (1 + len(place.site.kernel))
    return {"gain": found.take(RESCALE, gain, (*gain, *ones)) if found.has(RESCALE) else torch.ones(gain)}


def _rescale(place: Place) -> dict[str, Tensor]:
    """Return the gains in the shape that they have in a file, [out, 1, ...]."""
    return {RESCALE: place.operator.gain.view(-1, 1, *(1 for _ in place.site.kernel))}


def _skew(place: Place, found: Found, K: Size) -> Tensor:
    """Return Q [..., blocks, b, b]."""
    size = place.operator.size
    held = found.take(BLOCKS, (*K[:-1], size, size))
    return held - held.mT


def _within(Q: Tensor, place: Place, found: Found) -> Tensor:
    """Return Q scaled down to the constraint of the file."""
    if not found.has(ALPHA):
        return Q
    radius = found.take(ALPHA, (), (1,)).to(Q) * place.site.out_features
    if not (radius > 0 or found.names[ALPHA].startswith(CONSTRAINED)):
        return Q
    norm = torch.linalg.vector_norm(Q)
    return Q * (radius / norm) if norm > radius else Q


def _check_side(place: Place) -> None:
    if place.config.side != "outputs":
        raise ExportError(
            f"LyCORIS rotates outputs, but {place.site.path} rotates inputs; set side='outputs' and train again"
        )


def _blocks(place: Place, entries: Tensor) -> Tensor:
    """Return the blocks of OFT, [blocks, b, b], from their entries above the diagonal.

    Raises:
        ExportError: LyCORIS would confuse the number of blocks with their width.
    """
    size, outputs = place.operator.size, place.site.out_features
    if size > outputs // size:
        raise ExportError(
            f"LyCORIS needs at least as many blocks as a block is wide, but {place.site.path} has {outputs // size} of "
            f"width {size}; set a smaller block_size and train again"
        )
    return _upper(entries, size)


def _upper(entries: Tensor, size: int) -> Tensor:
    """Return matrices [..., b, b] with these entries above the diagonal."""
    upper = entries.new_zeros(*entries.shape[:-1], size, size)
    upper[..., *torch.triu_indices(size, size, 1)] = entries.detach()
    return upper


def _above(matrices: Tensor) -> Tensor:
    """Return the entries above the diagonals of matrices [..., b, b]."""
    size = matrices.shape[-1]
    return matrices[..., *torch.triu_indices(size, size, 1)]


def _reordered(matrices: Tensor, order: Tensor) -> Tensor:
    return matrices[..., order, :][..., order]


def _by_halves(size: int) -> Tensor:
    """Return the index in a block of LyCORIS of each coordinate in a block of peftcore, which has one half after the
    other."""
    return torch.arange(size).view(-1, 2).T.flatten()


def _in_turns(size: int) -> Tensor:
    """Return the inverse permutation of `_by_halves`."""
    return torch.arange(size).view(2, -1).T.flatten()
