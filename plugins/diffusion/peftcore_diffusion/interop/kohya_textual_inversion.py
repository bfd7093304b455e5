"""Textual inversion in files of kohya's sd-scripts. A file of a pipeline's adapters may also contain the vectors of new
words, as tensors such as ``bundle_emb.<word>.clip_l``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Size, Tensor

from peftcore.author.formats import VECTORS, Found, Held, KohyaMethod, Place
from peftcore.errors import ExportError


class KohyaTextualInversion(KohyaMethod):
    """Translates words, whose vectors are rows of a token table."""

    methods = ("textual_inversion",)
    below = telling = (VECTORS,)

    def fits(self, held: Held) -> bool:
        return bool(held.tokens) and self.reads(held.shapes)

    def options(self, held: Held) -> dict[str, Any]:
        return {"tokens": [token for _, token in held.tokens], "words": [word for word, _ in held.tokens]}

    def outputs(self, shapes: Mapping[str, Size]) -> int:
        return -1

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        return {"vectors": found.take(VECTORS, place.operator.vectors.shape)}

    def tokens(self, place: Place) -> Sequence[tuple[str, int]]:
        if not place.config.words:
            raise ExportError(
                'files of kohya store the names of the words: apply with words=["<cat>"], one for each token'
            )
        return list(zip(place.config.words, place.operator.tokens.tolist(), strict=True))

    def write(self, place: Place) -> tuple[float | None, dict[str, Tensor]]:
        return None, {VECTORS: place.operator.vectors}
