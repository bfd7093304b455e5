"""VeRA in peft's files (checked against peft 0.21).

``vera_lambda_d`` and ``vera_lambda_b`` are peftcore's d and b. A and B are stored for the whole adapter as ``vera_A``
and ``vera_B``. If a file lacks them (`save_projection` is false), they are drawn from the seed in its options, with the
same values as in peft.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Size, Tensor, nn

from peftcore.author import Transposed
from peftcore.author.formats import Found, Keys, PeftMethod, Place
from peftcore_reparameterized.interop._corners import corner


class PeftVeRA(PeftMethod):
    """Translates vectors between fixed random matrices."""

    methods = ("vera",)
    below = ("vera_lambda_d", "vera_lambda_b")
    root = ("vera_A", "vera_B")
    bias = "vera_only"
    kinds = (nn.Linear, Transposed)
    adds = True
    advice: ClassVar[Mapping[str, str]] = {
        "projection_prng_key": "use projection_seed=",
        "save_projection": "use store_basis=",
    }

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        return {
            "method": self.methods[0],
            "rank": keys.take("r", int, 256),
            "d_initial": float(keys.take("d_initial", float, 0.1)),
            "dropout": float(keys.take(f"{self.methods[0]}_dropout", float, 0.0)),
            "projection_seed": keys.take("projection_prng_key", int, 0),
            "store_basis": keys.take("save_projection", bool, True),
        }

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        d, b = place.operator.d.shape, place.operator.b.shape
        return {name: found.take(key, shape) for name, key, shape in zip("db", self.below, (d, b), strict=True)}

    def read_shared(self, name: str, module: nn.Module, found: Found) -> dict[str, Tensor]:
        found.used.update(found.names.values())  # peft passes over what it does not expect
        shapes = {each: value.shape for each, value in module.state_dict().items()}
        return {each: corner(found, f"{self.methods[0]}_{each}", shape) for each, shape in shapes.items()}

    def write_options(self, config: Any) -> dict[str, Any]:
        return {
            "r": config.rank,
            "d_initial": config.d_initial,
            f"{self.methods[0]}_dropout": config.dropout,
            "projection_prng_key": config.projection_seed,
            "save_projection": True,
        }

    def write(self, place: Place) -> dict[str, Tensor]:
        return dict(zip(self.below, (place.operator.d, place.operator.b), strict=True))

    def write_shared(self, name: str, module: nn.Module) -> dict[str, Tensor]:
        return {f"base_model.{self.methods[0]}_{each}": value for each, value in module.named_buffers()}
