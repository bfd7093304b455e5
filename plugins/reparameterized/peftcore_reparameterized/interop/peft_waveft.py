"""WaveFT in peft's files (checked against peft 0.21): ``waveft_spectrum`` is peftcore's c. The file does not contain
the positions, which are drawn from `random_loc_seed` as in peft. The number of coefficients is read from the shapes of
the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Size, Tensor, nn

from peftcore.author import Transposed
from peftcore.author.formats import Found, Keys, PeftMethod, Place
from peftcore.errors import CheckpointError

SAME = {"sym2": "db2", "sym3": "db3"}
"""Wavelets of other families that equal a Daubechies wavelet."""


class PeftWaveFT(PeftMethod):
    """Translates coefficients of wavelets."""

    methods = ("waveft",)
    below = ("waveft_spectrum",)
    bias = "waveft_only"
    patterns: ClassVar[Mapping[str, str]] = {"n_frequency_pattern": "n_frequency"}
    kinds = (nn.Linear, Transposed)
    adds = True
    advice: ClassVar[Mapping[str, str]] = {
        "scaling": "use alpha=",
        "wavelet_family": "use wavelet=",
        "use_idwt": "use wavelet=None for false",
        "random_loc_seed": "use entry_seed=",
        "proportional_parameters": "use overrides= with an n_frequency for each layer",
    }

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        keys.pass_over("proportional_parameters")  # the numbers that it led to are those of the tensors
        number = keys.take("n_frequency", int, 2592)
        name = keys.take("wavelet_family", str, "db1")
        wavelet = SAME.get(name, name) if keys.take("use_idwt", bool, True) else None
        if wavelet is not None and not wavelet.startswith("db"):
            raise CheckpointError(f"{keys.where}: peftcore's waveft has the wavelets db1 to db10, not {name}")
        return {
            "method": "waveft",
            "n_frequency": shapes["waveft_spectrum"][0] if "waveft_spectrum" in shapes else number,
            "alpha": float(keys.take("scaling", float, 25.0)),
            "wavelet": wavelet,
            "entry_seed": keys.take("random_loc_seed", int, 777),
        }

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        return {"c": found.take("waveft_spectrum", place.operator.c.shape)}

    def write_options(self, config: Any) -> dict[str, Any]:
        return {
            "n_frequency": config.n_frequency,
            "scaling": config.alpha,
            "wavelet_family": config.wavelet or "db1",
            "use_idwt": config.wavelet is not None,
            "random_loc_seed": config.entry_seed,
        }

    def write(self, place: Place) -> dict[str, Tensor]:
        return {"waveft_spectrum": place.operator.c}
