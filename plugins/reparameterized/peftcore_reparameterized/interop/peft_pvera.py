"""PVeRA in peft's files (checked against peft 0.21).

``pvera_lambda_d`` and ``pvera_lambda_b`` are our d and b. A and B belong to the whole adapter, ``pvera_A`` and
``pvera_B``; a file without them (`save_projection` false) means what its seed draws, which is the same here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Size, Tensor, nn

from peftcore.errors import ExportError
from peftcore.files.formats.found import Found
from peftcore.files.formats.keys import Keys
from peftcore.files.formats.peft_layers import not_added
from peftcore.files.formats.peft_method import PeftMethod
from peftcore.files.formats.places import Place
from peftcore.layers.kinds import Transposed
from peftcore_reparameterized.interop._corners import corner


class PeftPVeRA(PeftMethod):
    """Translates vectors between fixed random matrices."""

    methods = ("pvera",)
    below = ("pvera_lambda_d", "pvera_lambda_b")
    root = ("pvera_A", "pvera_B")
    bias = "pvera_only"
    kinds = (nn.Linear, Transposed)

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        keys.pass_over("generator_seed")  # of what is drawn in forwards: here torch's own generator draws
        return {
            "method": "pvera",
            "rank": keys.take("r", int, 256),
            "d_initial": float(keys.take("d_initial", float, 0.1)),
            "dropout": float(keys.take("pvera_dropout", float, 0.0)),
            "sample": "always" if keys.take("sample_at_inference", bool, False) else "training",
            "projection_seed": keys.take("projection_prng_key", int, 0),
            "store_basis": keys.take("save_projection", bool, True),
        }

    def differs(self, place: Place) -> str:
        return not_added(place.site)

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        d, b = place.operator.d.shape, place.operator.b.shape
        return {"d": found.take("pvera_lambda_d", d), "b": found.take("pvera_lambda_b", b)}

    def read_shared(self, name: str, module: nn.Module, found: Found) -> dict[str, Tensor]:
        found.used.update(found.names.values())  # peft passes over what it does not expect
        return {each: corner(found, f"pvera_{each}", value.shape) for each, value in module.state_dict().items()}

    def write_options(self, config: Any) -> dict[str, Any]:
        if config.sample == "never":
            raise ExportError('peft draws in training at least; sample="training" is what it has')
        return {
            "r": config.rank,
            "d_initial": config.d_initial,
            "pvera_dropout": config.dropout,
            "sample_at_inference": config.sample == "always",
            "projection_prng_key": config.projection_seed,
            "save_projection": True,
        }

    def write(self, place: Place) -> dict[str, Tensor]:
        return {"pvera_lambda_d": place.operator.d, "pvera_lambda_b": place.operator.b}

    def write_shared(self, name: str, module: nn.Module) -> dict[str, Tensor]:
        return {f"base_model.pvera_{each}": value for each, value in module.named_buffers()}
