"""OFT in peft's files (checked against peft 0.21).

``oft_R.weight`` is peftcore's K, and ``oft_embedding_R.weight`` is K of an embedding. Compared with peftcore, peft
rotates embeddings in the opposite direction. With the Neumann series, the default of peft, it rotates embeddings in the
same direction, and all other layers in the opposite one. The width of blocks is read from the shapes of the tensors.
The radius of COFT in peft lacks the factor b^2. peft treats inputs of four dimensions as images, also those of a linear
layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Size, Tensor, nn

from peftcore.author.formats import Found, Keys, PeftMethod, Place
from peftcore.errors import CheckpointError
from peftcore_reparameterized._rotations import width

SERIES_SINCE = (0, 18)
"""The first version of peft with the present series; peft warns that a file without a version is older."""


class PeftOFT(PeftMethod):
    """Translates rotations in blocks."""

    methods = ("oft",)
    below = ("oft_R.weight", "oft_embedding_R.weight")
    bias = "oft_only"
    kinds = (nn.Linear, nn.Conv2d, nn.Embedding)
    advice: ClassVar[Mapping[str, str]] = {
        "r": "use block_size=",
        "oft_block_size": "use block_size=",
        "module_dropout": "use block_dropout=",
        "coft": "use eps=",
        "use_cayley_neumann": "use series=",
        "num_cayley_neumann_terms": "use series=",
    }

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        dropout = float(keys.take("module_dropout", float, 0.0))
        if dropout:
            keys.warn(
                f"module_dropout = {dropout} had no effect in peft 0.21; here it is the share of blocks that do not "
                "rotate in training"
            )
        number, size = keys.take("r", int, 0), keys.take("oft_block_size", int)  # files before peft 0.14 have none
        held = next((shapes[name] for name in self.below if name in shapes), Size([number, size * (size - 1) // 2]))
        size = (1 + math.isqrt(1 + 8 * held[-1])) // 2
        if size < 2:
            raise CheckpointError(
                f"{keys.where}: blocks of width {size} cannot rotate; 'oft_block_size' must be 2 or more"
            )
        constrained, eps = keys.take("coft", bool, False), keys.take("eps", float, 6e-5)
        return {
            "method": "oft",
            "block_size": size,
            "block_share": keys.take("block_share", bool, False),
            "eps": eps / size**2 if constrained else None,
            "series": _series(keys),
            "block_dropout": dropout,
        }

    def differs(self, place: Place) -> str:
        site, config = place.site, place.config
        if config.side == "outputs" and not site.layer.one_hot:
            return "side='outputs': it rotates only inputs"
        if config.constraint is not None or config.rescaled:
            return "constraint= and rescaled=True, which it does not have"
        if isinstance(site.module, nn.Conv2d) and (math.prod(site.kernel) > 1 or site.module.groups > 1):
            return "kernels or groups above 1, where it sums the rotated patches that overlap"
        theirs, ours = _adjusted(width(site), config.block_size), place.operator.size
        if theirs != ours or (config.eps is not None and ours != config.block_size):
            return f"block_size={config.block_size} where it does not fit; {ours} would (set it in overrides)"
        return ""

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        name, sign = _name(place)
        return {"K": sign * found.take(name, place.operator.K.shape)}

    def write_options(self, config: Any) -> dict[str, Any]:
        constrained = config.eps is not None
        return {
            "r": 0,
            "oft_block_size": config.block_size,
            "block_share": config.block_share,
            "coft": constrained,
            "eps": float(f"{config.eps * config.block_size**2:.12g}") if constrained else 6e-5,
            "use_cayley_neumann": config.series is not None,
            "num_cayley_neumann_terms": config.series or 5,
            "module_dropout": config.block_dropout,
            "peft_version": ".".join(map(str, (*SERIES_SINCE, 0))),
        }

    def write(self, place: Place) -> dict[str, Tensor]:
        name, sign = _name(place)
        return {name: sign * place.operator.K.detach()}


def _name(place: Place) -> tuple[str, int]:
    """Return the name of the tensor at a place, and the factor (1 or -1) between it and peftcore's K."""
    table, series = place.site.layer.one_hot, place.config.series is not None
    return ("oft_embedding_R.weight" if table else "oft_R.weight"), 1 if table == series else -1


def _series(keys: Keys) -> int | None:
    """Return the number of terms of the Neumann series, or None if it is not used.

    Raises:
        CheckpointError: there are fewer than three terms.
    """
    terms, version = keys.take("num_cayley_neumann_terms", int, 5), keys.take("peft_version", str, "")
    if not keys.take("use_cayley_neumann", bool, True):
        return None
    if terms < 3:
        raise CheckpointError(
            f"{keys.where}: 'num_cayley_neumann_terms' is {terms}, with which peft's matrix is not a rotation"
        )
    numbers = tuple(int(each) for each in version.split(".")[:2] if each.isdecimal())
    if numbers < SERIES_SINCE:
        keys.warn(
            f"it was made by peft {version or 'of an old version'}, which had another Neumann series; peft since 0.18 "
            "and peftcore compute slightly other outputs than were trained"
        )
    return max(terms, 4)  # it computes the same for three


def _adjusted(size: int, wanted: int) -> int:
    """Return the width of blocks in peft: the width nearest to the wanted one that divides the rotated side."""
    if wanted >= size:
        return size
    lower = next(n for n in range(wanted, 0, -1) if size % n == 0)
    higher = next(n for n in range(wanted, size + 1) if size % n == 0)
    return lower if wanted - lower <= higher - wanted else higher
