"""HiRA in peft's files (checked against peft 0.21).

``hira_A`` and ``hira_B`` are peftcore's A and B. For an embedding, the names are ``hira_embedding_A`` and
``hira_embedding_B``. B of a convolution has a kernel of size 1. The rank is read from the shapes of the tensors,
because peft 0.21 ignores `rank_pattern`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Size, Tensor, nn

from peftcore.author import Transposed
from peftcore.author.formats import Found, Keys, PeftMethod, Place, not_added


class PeftHiRA(PeftMethod):
    """Translates the factors of HiRA."""

    methods = ("hira",)
    below = ("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B")
    kinds = (nn.Linear, Transposed, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        keys.pass_over("rank_pattern")
        rank, dropout = keys.take("r", int, 32), float(keys.take("hira_dropout", float, 0.0))
        table = shapes.get("hira_embedding_A")  # tokens cannot be dropped in parts, and peft drops none
        held = shapes.get("hira_A") or table
        return {"method": "hira", "rank": held[0] if held else rank, "dropout": 0.0 if table else dropout}

    def differs(self, place: Place) -> str:
        module = place.site.module
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups > 1:
            return "groups"
        return not_added(place.site)

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        A, B = place.operator.A.shape, place.operator.B.shape
        inside = "embedding_" if place.site.layer.one_hot else ""
        ones = (1,) * len(place.site.kernel)
        return {"A": found.take(f"hira_{inside}A", A), "B": found.take(f"hira_{inside}B", (*B,), (*B, *ones))}

    def write_options_at(self, place: Place) -> dict[str, Any]:
        dropout = {} if place.site.layer.one_hot else {"hira_dropout": place.config.dropout}
        return {"r": place.config.rank, **dropout}

    def write(self, place: Place) -> dict[str, Tensor]:
        A, B = place.operator.A.detach(), place.operator.B.detach()
        inside = "embedding_" if place.site.layer.one_hot else ""
        return {f"hira_{inside}A": A, f"hira_{inside}B": B.view(*B.shape, *(1 for _ in place.site.kernel))}
