"""BOFT in peft's files (checked against peft 0.21).

``boft_R`` [factors, blocks, b, b] is a full matrix Q whose skew-symmetric part is K; peftcore stores only the entries
of K above the diagonal. ``boft_s`` is peftcore's gain, as a column, or as a row in a convolution. The width of blocks
and the number of factors are read from the shapes of the tensors, because without its CUDA kernel peft creates one
factor, regardless of the options. Such a model of peft cannot load more factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Size, Tensor, nn

from peftcore.author.formats import Found, Keys, PeftMethod, Place, not_added, uneven
from peftcore.errors import CheckpointError
from peftcore_reparameterized._kernels import plain_skew


class PeftBOFT(PeftMethod):
    """Translates butterfly factors."""

    methods = ("boft",)
    below = ("boft_R", "boft_s")
    bias = "boft_only"
    kinds = (nn.Linear, nn.Conv2d)
    advice: ClassVar[Mapping[str, str]] = {
        "boft_block_size": "use block_size=",
        "boft_block_num": "use block_size=, the width by the number of blocks",
        "boft_n_butterfly_factor": "use factors=",
        "boft_dropout": "use block_dropout=",
    }

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        dropout = float(keys.take("boft_dropout", float, 0.0))
        keys.pass_over("boft_block_num")  # the other way of saying how wide a block is
        factors, size = keys.take("boft_n_butterfly_factor", int, 1), keys.take("boft_block_size", int, 4)
        held = shapes.get("boft_R", Size([factors, 0, size, size]))
        if len(held) != 4 or held[-1] < 2:
            raise CheckpointError(
                f"{keys.where}: boft_R has shape {tuple(held)}; expected factors, blocks, and twice the width of a "
                "block, which is 2 or more"
            )  # fmt: skip
        return {"method": "boft", "factors": held[0], "block_size": held[-1], "block_dropout": dropout}

    def differs(self, place: Place) -> str:
        if place.config.side == "outputs":
            return "side='outputs': it rotates only inputs"
        size, wanted = place.operator.size, place.config.block_size
        if size != wanted:
            return f"blocks of width {wanted} where they do not fit; {size} would (set block_size in overrides)"
        return uneven(place.site.module) or not_added(place.site)

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        K, size = place.operator.K.shape, place.operator.size
        Q = found.take("boft_R", (*K[:-1], size, size))
        row, column = torch.triu_indices(size, size, 1)
        gain = place.operator.gain.shape
        return {
            "K": (Q - Q.mT)[..., row, column] / 2,
            "gain": found.take("boft_s", gain, (*gain, 1), (1, *gain)),
        }

    def write_options(self, config: Any) -> dict[str, Any]:
        return {
            "boft_block_size": config.block_size,
            "boft_block_num": 0,
            "boft_n_butterfly_factor": config.factors,
            "boft_dropout": config.block_dropout,
        }

    def write(self, place: Place) -> dict[str, Tensor]:
        gain = place.operator.gain.detach()
        K = plain_skew(place.operator.K.detach(), place.operator.size).to(gain.dtype)
        return {"boft_R": K, "boft_s": gain.view(1, -1) if place.site.kernel else gain.view(-1, 1)}
