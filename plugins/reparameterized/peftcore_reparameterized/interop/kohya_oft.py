"""OFT and BOFT in files of LyCORIS, there diag-oft and boft, and OFT in those of kohya's sd-scripts (checked against
LyCORIS 4.1).

Both turn the outputs of a weight: ours do with ``side="outputs"``. ``oft_blocks`` holds a full matrix, of which the
skew-symmetric Q = X - X^T counts: [blocks, b, b] without butterflies, [factors, blocks, b, b] with. ``rescale`` are
gains of the outputs: with them a file without butterflies is our BOFT of one factor. Theirs turn the other way than
ours in butterflies, and the coordinates of a block take turns between its two halves.

``alpha`` is a constraint: it times the outputs is the norm that Q is scaled down to; none is 0 in LyCORIS. It is read
into K, so that outputs are the same; ours has none of the kind for further training.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Size, Tensor

from peftcore.errors import CheckpointError, ExportError
from peftcore.files.formats.found import Found
from peftcore.files.formats.kohya import ALPHA, Held, KohyaMethod
from peftcore.files.formats.places import Place

BLOCKS, RESCALE = "oft_blocks", "rescale"
CONSTRAINED = "oft_unet"
"""The prefix of sd-scripts, in which a constraint of 0 lets nothing turn."""


class KohyaOFT(KohyaMethod):
    """Translates rotations in blocks."""

    methods = ("oft",)
    below = (BLOCKS,)
    telling = (BLOCKS,)

    def reads(self, shapes: Mapping[str, Size]) -> bool:
        return super().reads(shapes) and len(shapes[BLOCKS]) == 3

    def options(self, held: Held) -> dict[str, Any]:
        return {"side": "outputs", "block_size": _width(held)}

    def outputs(self, shapes: Mapping[str, Size]) -> int:
        held = shapes.get(BLOCKS, ())
        return held[-3] * held[-2] if len(held) >= 3 else -1

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        return {"K": _above(_skew(place, found, place.operator.K.shape))}

    def write(self, place: Place) -> tuple[float, dict[str, Tensor]]:
        operator, config = place.operator, place.config
        _check_side(place)
        if config.series is not None:
            raise ExportError(
                f"LyCORIS has no Neumann series, with which {place.site.path} turns; set series=None and train again"
            )
        blocks = place.site.out_features // operator.size
        return 0.0, {BLOCKS: _blocks(place, operator.entries().expand(blocks, -1))}


class KohyaBOFT(KohyaOFT):
    """Translates butterfly factors with gains of the outputs."""

    methods = ("boft",)
    below = (BLOCKS, RESCALE)

    def reads(self, shapes: Mapping[str, Size]) -> bool:
        if not KohyaMethod.reads(self, shapes):
            return False
        return len(shapes.get(BLOCKS, ())) == 4 or (len(shapes.get(BLOCKS, ())) == 3 and RESCALE in shapes)

    def options(self, held: Held) -> dict[str, Any]:
        factors = held.size(BLOCKS, 0) if len(held.shapes[BLOCKS]) == 4 else 1
        return super().options(held) | {"factors": factors}

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        K, gain = place.operator.K.shape, place.operator.gain.shape
        if len(found.shape(BLOCKS)) == 3:
            tensors = {"K": _above(_skew(place, found, K[1:]))[None]}
        else:
            tensors = {"K": _above(-_reordered(_skew(place, found, K), _by_halves(place.operator.size)))}
        ones = [1] * (1 + len(place.site.kernel))
        return tensors | {"gain": found.take(RESCALE, gain, (*gain, *ones)) if found.has(RESCALE) else torch.ones(gain)}

    def write(self, place: Place) -> tuple[float, dict[str, Tensor]]:
        operator, outputs = place.operator, place.site.out_features
        _check_side(place)
        gains = {RESCALE: operator.gain.view(-1, 1, *(1 for _ in place.site.kernel))}
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
        CheckpointError: they do not turn.
    """
    size = held.size(BLOCKS, -1)
    if size < 2:
        raise CheckpointError(
            f"{held.where}: blocks of width {size} do not turn; remove the tensors of this module from the file"
        )
    if held.given:
        warnings.warn(
            f"{held.where.rpartition(': ')[0]} was trained with a constraint (alpha = {held.given:g}), which ours has "
            "not in this form: outputs are the same without, further training is not",
            UserWarning,
            stacklevel=2,
        )
    return size


def _skew(place: Place, found: Found, K: Size) -> Tensor:
    """Return Q [..., blocks, b, b], scaled down to the constraint."""
    size = place.operator.size
    held = found.take(BLOCKS, (*K[:-1], size, size))
    Q = held - held.mT
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
            f"LyCORIS turns outputs, and the inputs turn at {place.site.path}; set side='outputs' and train again"
        )


def _blocks(place: Place, entries: Tensor) -> Tensor:
    """Return blocks without butterflies, [blocks, b, b], of their entries above the diagonal.

    Raises:
        ExportError: LyCORIS takes the number of blocks for their width.
    """
    size, outputs = place.operator.size, place.site.out_features
    if size > outputs // size:
        raise ExportError(
            f"LyCORIS has no blocks wider than there are of them, and {place.site.path} has {outputs // size} of width "
            f"{size}; set a smaller block_size and train again"
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
    """Return where each coordinate of a block of ours, one half after the other, stands in theirs."""
    return torch.arange(size).view(-1, 2).T.flatten()


def _in_turns(size: int) -> Tensor:
    """Return the opposite of `_by_halves`."""
    return torch.arange(size).view(2, -1).T.flatten()
