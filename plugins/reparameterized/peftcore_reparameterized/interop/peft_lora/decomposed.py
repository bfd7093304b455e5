"""PiSSA and OLoRA in peft's files, alone and combined with DoRA. They are values of `init_lora_weights` for which peft
decomposes the base again when it loads the file.

Such a file describes the weight W - s B0 A0 + s B A. Every exact decomposition gives the same product s B0 A0, so
peftcore computes A0 and B0 from the host. The adapter is written as plain LoRA of twice the rank, which is correct on
any equal base. DoRA with such a start is read as DoRA of twice the rank, whose update is B A - B0 A0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Size, Tensor, nn

from peftcore.author import Site, Transposed
from peftcore.author.formats import Found, Keys, Place, is_one_of
from peftcore.errors import CheckpointError
from peftcore_reparameterized._decomposed import PairOperator
from peftcore_reparameterized.interop.peft_lora.dora import DoRAVariant
from peftcore_reparameterized.interop.peft_lora.plain import UpdateVariant
from peftcore_reparameterized.olora import OLoRA, OLoRAOperator
from peftcore_reparameterized.pissa import PiSSA, PiSSAOperator


class DecomposedVariant(UpdateVariant):
    """A variant for which peft decomposes the base when it loads the file. It is written as plain LoRA for every kind
    of layer."""

    layers: ClassVar[tuple[type, ...]]
    """The layers that peft can decompose."""
    has_scaling = False
    times = 2

    def shapes(self, place: Place) -> tuple[Size, Size]:
        if not is_one_of(place.site, self.layers):
            raise CheckpointError(f"{place.site.path} is not one of the layers that peft decomposes for {self.reads}")
        return super().shapes(place)


class StartVariant(DecomposedVariant, ABC):
    """A variant that subtracts a part of the given rank from the base and trains it. It has the same name in peft and
    in peftcore."""

    def marked(self, keys: Keys) -> bool:
        return bool(keys.take("init_lora_weights", (bool, str), True) == self.reads)

    @abstractmethod
    def taken_out(self, site: Site, rank: int, alpha: float) -> PairOperator:
        """Returns an operator with the factors A0 and B0 of the part that peft subtracts from a site's weight."""


class PiSSAVariant(StartVariant):
    """PiSSA, which trains the principal singular directions of the base."""

    reads = "pissa"
    writes = ("pissa",)
    starts = ("pissa",)
    layers = (nn.Linear, Transposed)

    def taken_out(self, site: Site, rank: int, alpha: float) -> PairOperator:
        return PiSSAOperator(site, PiSSA.Config(rank=rank, alpha=alpha))


class OLoRAVariant(StartVariant):
    """OLoRA, which trains the first columns of the base's QR decomposition."""

    reads = "olora"
    writes = ("olora",)
    starts = ("olora",)
    layers = (nn.Linear,)

    def taken_out(self, site: Site, rank: int, alpha: float) -> PairOperator:
        return OLoRAOperator(site, OLoRA.Config(rank=rank, alpha=alpha))


class DoRABesideStart(DoRAVariant):
    """DoRA of a base from which PiSSA or OLoRA subtracted a part. In peftcore's DoRA the low-rank update contains that
    part."""

    start: ClassVar[StartVariant]
    writes = ()

    def marked(self, keys: Keys) -> bool:
        return super().marked(keys) and self.start.marked(keys)

    def options(self, keys: Keys, shapes: Mapping[str, Size], common: Mapping[str, Any]) -> dict[str, Any]:
        start = self.start.reads
        keys.warn(f"DoRA with start {start} is loaded as DoRA of twice the rank; in training, the start trains too")
        return {**common, "rank": 2 * common["rank"], "alpha": 2 * common["alpha"]}

    def shapes(self, place: Place) -> tuple[Size, Size]:
        A, B = self.start.shapes(place)
        half = place.config.rank // 2
        return Size([half, *A[1:]]), Size([*B[:-1], half])

    def read(self, place: Place, found: Found, factors: dict[str, Tensor]) -> dict[str, Tensor]:
        site = replace(place.site, meta=False)
        out = self.start.taken_out(site, place.config.rank // 2, place.config.alpha / 2)  # with the scale of the file
        both = {"A": torch.cat([factors["A"], out.A0]), "B": torch.cat([factors["B"], -out.B0], -1)}
        return super().read(place, found, both)


class DoRABesidePiSSA(DoRABesideStart):
    """DoRA with the start of PiSSA."""

    start = PiSSAVariant()
    starts = PiSSAVariant.starts


class DoRABesideOLoRA(DoRABesideStart):
    """DoRA with the start of OLoRA."""

    start = OLoRAVariant()
    starts = OLoRAVariant.starts
