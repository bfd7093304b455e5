"""Base operator and options of methods that train LoRA's factors on a quantized model."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import PositiveFloat
from torch import Tensor, nn

from peftcore.author import Share, Site
from peftcore.errors import UnsupportedSite
from peftcore_quantized._packed_base import Factors, PackedBaseOperator, PackedConfig, lora_start


class LoRAConfig(PackedConfig):
    """Options of methods that train LoRA's factors on a quantized model."""

    alpha: PositiveFloat = 16.0
    """Numerator of the scale ``alpha / rank``."""
    dropout: Share = 0.0
    """Probability with which inputs of the update are dropped in training. Requires a base that is quantized
    already."""


class LoRAOnPacked(PackedBaseOperator):
    """LoRA's update of one site.

    Args:
        site: the site.
        config: its options.
        start: initial values of A and B; by default as in LoRA.
    """

    padded, scaled = frozenset({"A", "B"}), frozenset({"B"})

    def __init__(self, site: Site, config: LoRAConfig, start: Factors | None = None) -> None:
        if config.dropout and not site.layer.packed:
            raise UnsupportedSite(
                f"{site.path} is not quantized yet, and dropout needs its quantized weight; call peftcore.quantize "
                "first"
            )
        super().__init__(site, config, start or lora_start(site, config.rank), scale=config.alpha / config.rank)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        A, B = self.cast(y, self.A, self.B)
        return self.layer.add(y, self.layer.apply(self.dropout(self.seen(x)), A), B, self.scale)

    def seen(self, x: Tensor) -> Tensor:
        """Return the input of factor A, computed from the input x of the layer."""
        return x
