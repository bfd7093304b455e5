"""OSF in peft's files (checked against peft 0.21).

``osf_svd_params.U_low``, ``.S_low`` and ``.V_low`` are peftcore's U, S and V. The file lacks their initial values and
the frozen singular directions. peft computes them from the model's weight when it loads a file, and so does this
translation. When a file is read, the number of frozen singular values is derived from the shapes, and `effective_rank`
and `rank_pattern` are ignored. When a file is written, both contain numbers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Size, Tensor, nn

from peftcore.author.formats import Found, Keys, PeftMethod, Place
from peftcore.errors import CheckpointError
from peftcore_reparameterized.osf import OSFOperator, frozen_rank

STEM = "osf_svd_params."


class PeftOSF(PeftMethod):
    """Translates singular vectors and values."""

    methods = ("osf",)
    below = tuple(f"{STEM}{each}_low" for each in "USV")
    kinds = (nn.Linear,)
    adds = True
    patterns = {"rank_pattern": "effective_rank"}  # noqa: RUF012
    advice: ClassVar[Mapping[str, str]] = {
        "rank_pattern": 'use overrides={"*.q_proj": {"effective_rank": 4}}',
        "target_svd_config": "use effective_rank=",
    }

    def changes(self, keys: Keys, paths: Collection[str]) -> dict[str, dict[str, Any]]:
        keys.pass_over("rank_pattern", "effective_rank", "target_svd_config")
        return {}

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        U, V = shapes.get(f"{STEM}U_low", Size()), shapes.get(f"{STEM}V_low", Size())
        if not (len(U) == len(V) == 2 and 0 < U[1] < min(U[0], V[1])):
            raise CheckpointError(
                f"{keys.where}: OSF has U_low {tuple(U)} and V_low {tuple(V)}, which do not fit each other"
            )
        return {"method": "osf", "effective_rank": min(U[0], V[1]) - U[1]}

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        tensors = dict(OSFOperator(replace(place.site, meta=False), place.config).named_buffers())
        for each in "USV":
            tensors[each] = found.take(f"{STEM}{each}_low", place.operator.get_tensor(each).shape)
        return tensors

    def pattern(self, path: str, paths: Collection[str]) -> str:
        return f"^{re.escape(path)}$"

    def write_options_at(self, place: Place) -> dict[str, Any]:
        return {"effective_rank": frozen_rank(place.site, place.config)}

    def write(self, place: Place) -> dict[str, Tensor]:
        return {f"{STEM}{each}_low": place.operator.get_tensor(each) for each in "USV"}
