"""C3A in peft's files (checked against peft 0.21): ``c3a_kernel`` is peftcore's w. The width of blocks is read from the
shapes of the tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from torch import Size, Tensor, nn

from peftcore.author.formats import Found, Keys, PeftMethod, Place
from peftcore_reparameterized.interop._paths import path_as_pattern


class PeftC3A(PeftMethod):
    """Translates kernels of circular convolutions."""

    methods = ("c3a",)
    below = ("c3a_kernel",)
    bias = "c3a_only"
    patterns: ClassVar[Mapping[str, str]] = {"block_size_pattern": "block_size"}
    kinds = (nn.Linear,)
    adds = True

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        width = keys.take("block_size", int, 256)
        return {"method": "c3a", "block_size": shapes["c3a_kernel"][-1] if "c3a_kernel" in shapes else width}

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        return {"w": found.take("c3a_kernel", place.operator.w.shape)}

    def write_options(self, config: Any) -> dict[str, Any]:
        return {"block_size": config.block_size}

    def pattern(self, path: str, paths: Collection[str]) -> str:
        return path_as_pattern(path, paths, "block_size")

    def write(self, place: Place) -> dict[str, Tensor]:
        return {"c3a_kernel": place.operator.w}
