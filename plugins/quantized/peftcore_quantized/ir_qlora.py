"""IR-QLoRA: information retention.   Qin et al. 2024, arXiv 2402.05445 (htqin/IR-QLoRA).

Equation:
    y = Q x + b + s (B h + b2 repeat(h)),   h = A dropout(x) + b1 mean(x),   s = alpha / rank
    Q = nf4(W - t) + t,   t the shift of each block with which the 16 codes carry the most information

mean(x) [rank] contains the means of `rank` groups of neighbouring inputs, and repeat(h) [out] repeats each entry of h
out / rank times. These are the paper's elastic connections, which bypass A and B, with trained gates b1 and b2 [1]. The
update is linear, (B + b2 R)(A + b1 P) with constant P and R, so it can be merged. The rank must divide the numbers of
inputs and outputs.

The default scheme is "nf4-icq"; the connections work with any other scheme too. nf4-icq searches t when the model is
quantized. On a model that is still dense it searches t in the first forward, and again in the first forward after a
weight has changed. In a convolution, a group of inputs consists of whole channels, with all positions of the kernel.
Experts share the gates.

Parameters: rank * (in * kernel + out) a site, times the number of experts, + 2.

Start: B, b1 and b2 at zero, A as in LoRA: an identity on a model that is quantized already; a dense model is rounded.

Differs from the authors' code: No difference is known. In the connections, the paper uses a greatest common divisor in
place of the rank; the authors' code uses the rank.

Use it: `peftcore.apply(model, "ir_qlora")`, instead of QLoRA where the loss of quality at 4 bits is too large.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import LearningRate, Method, Share, Site, Surgeon, Tags
from peftcore.errors import UnsupportedSite
from peftcore_quantized._packed_base import Factors, PackedBaseOperator, PackedConfig, lora_start, place, update_count


class IRQLoRAConfig(PackedConfig):
    """Options of IR-QLoRA."""

    method: Literal["ir_qlora"] = "ir_qlora"
    rank: PositiveInt = 64
    """Rank of the update; it must divide the numbers of inputs and outputs."""
    alpha: PositiveFloat = 16.0
    """Numerator of the scale ``alpha / rank``."""
    dropout: Share = 0.0
    """Probability with which inputs of A are dropped in training. The inputs of mean(x) are not dropped. Requires a
    base that is quantized already."""
    scheme: str = "nf4-icq"
    """The scheme that quantizes the base, as in ``peftcore.quantize(model, scheme)``. A base that is quantized already
    is not changed."""


class IRQLoRAOperator(PackedBaseOperator):
    """The update of one site, and the connections that bypass its factors."""

    def __init__(self, site: Site, config: IRQLoRAConfig) -> None:
        rank = config.rank
        if site.in_features % rank or site.out_features % rank:
            sizes = f"{site.in_features} inputs and {site.out_features} outputs"
            raise UnsupportedSite(f"{site.path}: rank={rank} must divide {sizes}; set another rank, or exclude it")
        if config.dropout and not site.layer.packed:
            raise UnsupportedSite(
                f"{site.path} is not quantized yet, and dropout needs its quantized weight; call peftcore.quantize "
                "first"
            )
        super().__init__(site, config, lora_start(site, rank), scale=config.alpha / rank)
        self.b1, self.b2 = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def connected(self) -> Factors:
        """Return the factors with the connections, ``A + b1 P`` and ``B + b2 R``."""
        batch = self.layer.batch_dims
        rank, inputs, *kernel = self.A.shape[batch:]
        unit = torch.eye(rank, dtype=self.A.dtype, device=self.A.device)
        means = unit.repeat_interleave(inputs // rank, 1) * (rank / (inputs * math.prod(kernel)))  # [rank, in]
        repeats = unit.repeat_interleave(self.B.shape[-2] // rank, 0)  # [out, rank]
        return Factors(self.A + self.b1 * means.view(rank, inputs, *[1] * len(kernel)), self.B + self.b2 * repeats)

    def merged(self, weight: Tensor) -> Tensor:
        return self.held(weight) + self.product(*self.connected(), weight)

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        A, B, b1, b2 = self.cast(y, self.A, self.B, self.b1, self.b2)
        means = x.unflatten(-1, (len(A), -1)).mean(-1)  # [..., rank]
        h = self.layer.apply(self.dropout(x), A).to(y.dtype) + b1 * means.to(y.dtype)
        return self.layer.add(y, h, B, self.scale) + self.scale * b2 * h.repeat_interleave(len(B) // len(A), -1)


class IRQLoRA(Method):
    """Low-rank adapters with bypassing connections, on a calibrated 4-bit base."""

    name = "ir_qlora"
    Config = IRQLoRAConfig
    tags = Tags(category="quantized", paper="2402.05445", mergeable=True, identity_at_init=False)
    learning_rate = LearningRate(2e-4, "htqin/IR-QLoRA@e6fef4a, irlora.py", on="LLaMA-7B, Alpaca")
    target = ("all-linear",)
    alternatives = ("all-layers",)

    def inject(self, model: nn.Module, config: IRQLoRAConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(place(site), IRQLoRAOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: IRQLoRAConfig) -> int:
        return update_count(site, config.rank) + 2
