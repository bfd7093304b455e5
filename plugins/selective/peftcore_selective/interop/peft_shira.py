"""SHiRA in peft's files (checked against peft 0.21).

``shira_weight`` [entries] is added to the weight at ``shira_indices`` [2, entries], which are rows and columns. `shira`
stores each position as one number, in ascending order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Size, Tensor, nn

from peftcore.author.formats import Found, Keys, PeftMethod, Place
from peftcore.errors import ExportError


class PeftSHiRA(PeftMethod):
    """Translates some entries of a weight."""

    methods = ("shira",)
    below = ("shira_weight", "shira_indices")
    kinds = (nn.Linear,)
    adds = True
    advice: ClassVar[Mapping[str, str]] = {
        "mask_type": "use mask=",
        "random_seed": "use seed=",
    }

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        keys.pass_over("mask_type", "random_seed", "mask_fn")
        return {"method": "shira", "rank": keys.take("r", int, 32)}

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        out, width = place.site.weight_shape
        count = place.operator.values.shape[0]
        values, places = found.take("shira_weight", (count,)), found.take("shira_indices", (2, count)).long()
        limits = torch.tensor([[out], [width]])
        index, order = (places[0] * width + places[1]).sort()
        if ((places < 0) | (places >= limits)).any() or (index.diff() == 0).any():
            found.wrong.append(f"the shira_indices of {place.site.path} are not distinct entries of {(out, width)}")
        return {"index": index.to(torch.int32), "values": values[order]}

    def holds(self, config: Any) -> bool:
        return config.sparsity is None and not config.low_rank

    def write_options(self, config: Any) -> dict[str, Any]:
        if not self.holds(config):
            raise ExportError("peft's SHIRA has neither sparsity nor low_rank; use peftcore's own format")
        return {"r": config.rank, "mask_type": "random"}

    def write(self, place: Place) -> dict[str, Tensor]:
        index, width = place.operator.index, place.site.weight_shape[1]
        return {"shira_weight": place.operator.values, "shira_indices": torch.stack([index // width, index % width])}
