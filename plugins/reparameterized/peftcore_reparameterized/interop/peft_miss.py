"""MiSS in peft's files (checked against peft 0.21): ``miss_block`` is peftcore's D. `init_weights` also selects the
equation: with "mini" `mini_r` outputs are repeated, and with "bat" the update depends on the weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Size, Tensor, nn

from peftcore.author.formats import Found, Keys, PeftMethod, Place, not_added
from peftcore.errors import CheckpointError


class PeftMiSS(PeftMethod):
    """Translates shards that columns share."""

    methods = ("miss",)
    below = ("miss_block",)
    bias = "MiSS_only"
    kinds = (nn.Linear,)
    advice: ClassVar[Mapping[str, str]] = {
        "mini_r": "use outputs=",
    }

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        start = keys.take("init_weights", (bool, str), True)
        if isinstance(start, str) and start not in ("bat", "mini"):
            raise CheckpointError(f"{keys.where}: MiSS with init_weights = {start!r} is unknown to peftcore")
        rank, dropout = keys.take("r", int, 64), keys.take("miss_dropout", float, 0.0)
        outputs = keys.take("mini_r", int, 1)
        return {
            "method": "miss",
            "rank": rank,
            "dropout": 0.0 if start == "bat" else float(dropout),  # which it does not use there
            "outputs": outputs if start == "mini" else None,
            "bat": start == "bat",
        }

    def differs(self, place: Place) -> str:
        rank, columns = place.config.rank, place.site.in_features
        return f"rank={rank} above the {columns} inputs, which it refuses" if rank > columns else not_added(place.site)

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        return {"D": found.take("miss_block", place.operator.D.shape)}

    def write_options(self, config: Any) -> dict[str, Any]:
        mini = config.outputs is not None
        return {
            "r": config.rank,
            "miss_dropout": config.dropout,
            "init_weights": "bat" if config.bat else "mini" if mini else True,
            "mini_r": config.outputs if mini else 1,
        }

    def write(self, place: Place) -> dict[str, Tensor]:
        return {"miss_block": place.operator.D}
