"""FourierFT in peft's files (checked against peft 0.21): ``fourierft_spectrum`` is peftcore's c. The file does not
contain the positions, which are drawn from `random_loc_seed` as in peft. The number of entries is read from the shapes
of the tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from torch import Size, Tensor, nn

from peftcore.author import Transposed
from peftcore.author.formats import Found, Keys, PeftMethod, Place
from peftcore_reparameterized.interop._paths import path_as_pattern


class PeftFourierFT(PeftMethod):
    """Translates entries of spectra."""

    methods = ("fourierft",)
    below = ("fourierft_spectrum",)
    bias = "fourier_only"
    patterns: ClassVar[Mapping[str, str]] = {"n_frequency_pattern": "n_frequency"}
    kinds = (nn.Linear, Transposed)
    adds = True
    advice: ClassVar[Mapping[str, str]] = {
        "scaling": "use alpha=",
        "random_loc_seed": "use entry_seed=",
    }

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        number = keys.take("n_frequency", int, 1000)
        return {
            "method": "fourierft",
            "n_frequency": shapes["fourierft_spectrum"][0] if "fourierft_spectrum" in shapes else number,
            "alpha": float(keys.take("scaling", float, 150.0)),
            "entry_seed": keys.take("random_loc_seed", int, 777),
        }

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        return {"c": found.take("fourierft_spectrum", place.operator.c.shape)}

    def write_options(self, config: Any) -> dict[str, Any]:
        return {
            "n_frequency": config.n_frequency,
            "scaling": config.alpha,
            "random_loc_seed": config.entry_seed,
        }

    def pattern(self, path: str, paths: Collection[str]) -> str:
        return path_as_pattern(path, paths, "n_frequency")

    def write(self, place: Place) -> dict[str, Tensor]:
        return {"fourierft_spectrum": place.operator.c}
