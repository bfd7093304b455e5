"""Norm tuning in files of peft, which calls it LN_TUNING (checked against peft 0.21).

Peft saves a copy of each norm, under ``ln_tuning_layers``. The copy's gain and bias replace those of the host's norm.
The copy includes running statistics. peftcore uses the statistics of the host, so those of the file must be the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Size, Tensor

from peftcore.author.formats import Found, Keys, PeftMethod, Place

COPY = "ln_tuning_layers"
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class PeftNorms(PeftMethod):
    """Translates gains and biases of norms."""

    methods = ("ln_tuning",)
    below = tuple(f"{COPY}.{name}" for name in ("weight", "bias", *STATISTICS))

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        return {"method": "ln_tuning"}

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        site = place.site
        for name in STATISTICS:
            own = site.module._buffers.get(name)
            if found.has(f"{COPY}.{name}") and own is not None:
                theirs = found.take(f"{COPY}.{name}", own.shape)
                if not torch.equal(theirs.to(own), own):
                    found.wrong.append(f"the {name} of {site.module_path} differs from the host's")
        return {"value": found.take(f"{COPY}.{site.tensor}", place.operator.value.shape)}

    def write(self, place: Place) -> dict[str, Tensor]:
        buffers = place.site.module._buffers
        held = {f"{COPY}.{name}": buffers[name] for name in STATISTICS if buffers.get(name) is not None}
        return {f"{COPY}.{place.site.tensor}": place.operator.value, **held}
