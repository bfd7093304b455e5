"""MiSS in peft's files (checked against peft 0.21): ``miss_block`` is our D. The variants "bat" and "mini" are other
equations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Size, Tensor, nn

from peftcore.errors import CheckpointError
from peftcore.interop.found import Found
from peftcore.interop.keys import Keys
from peftcore.interop.peft import PeftMethod, Place
from peftcore.interop.peft_layers import not_added


class PeftMiSS(PeftMethod):
    """Matrix shard sharing."""

    methods = ("miss",)
    below = ("miss_block",)
    bias = "MiSS_only"
    kinds = (nn.Linear,)

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        start = keys.take("init_weights", (bool, str), True)
        if isinstance(start, str):
            raise CheckpointError(f"{keys.where}: MiSS with init_weights = {start!r} is another equation, which "
                                  "peftcore does not have")  # fmt: skip
        keys.pass_over("mini_r")  # it belongs to one of those
        rank, dropout = keys.take("r", int, 64), keys.take("miss_dropout", float, 0.0)
        return {"method": "miss", "rank": rank, "dropout": float(dropout)}

    def differs(self, place: Place) -> str:
        return not_added(place.site)

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        return {"D": found.take("miss_block", place.operator.D.shape)}

    def write_options(self, config: Any) -> dict[str, Any]:
        return {"r": config.rank, "miss_dropout": config.dropout, "init_weights": True}

    def write(self, place: Place) -> dict[str, Tensor]:
        return {"miss_block": place.operator.D}
