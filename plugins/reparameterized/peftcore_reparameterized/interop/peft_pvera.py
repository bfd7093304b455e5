"""PVeRA in peft's files (checked against peft 0.21): the tensors of VeRA's files under different names, and an option
that selects when z is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Size

from peftcore.author.formats import Keys
from peftcore.errors import ExportError
from peftcore_reparameterized.interop.peft_vera import PeftVeRA


class PeftPVeRA(PeftVeRA):
    """Translates vectors between fixed random matrices, the first of which gives means and variances."""

    methods = ("pvera",)
    below = ("pvera_lambda_d", "pvera_lambda_b")
    root = ("pvera_A", "pvera_B")
    bias = "pvera_only"
    advice: ClassVar[Mapping[str, str]] = {
        "projection_prng_key": "use projection_seed=",
        "save_projection": "use store_basis=",
        "sample_at_inference": 'use sample="always"',
        "generator_seed": "use torch.manual_seed, or seeds= of a route",
    }

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        keys.pass_over("generator_seed")  # of what is drawn in forwards: here torch's own generator draws
        sample = "always" if keys.take("sample_at_inference", bool, False) else "training"
        return {**super().options(keys, shapes), "sample": sample}

    def write_options(self, config: Any) -> dict[str, Any]:
        if config.sample == "never":
            raise ExportError('peft samples in training at least; set sample="training"')
        return {**super().write_options(config), "sample_at_inference": config.sample == "always"}
