"""BOFT: orthogonal fine-tuning by butterfly factors.   Liu et al. 2023, arXiv 2311.06243.

Equation:
    W' = diag(s) W R^T,   R = B_m ... B_1,   B_i = P_i diag(R_1, ..., R_k) P_i^T,   R_j = (I - K_j) (I + K_j)^-1

The inputs are split into halves of blocks, b / 2 coordinates each. A block of B_1 consists of two neighbouring halves,
and a block of B_i of two halves at the distance 2^(i - 1), as in a fast Fourier transform. So after m factors each
input is mixed with b 2^(m - 1) others, with few parameters. K is skew-symmetric, and the bias is not scaled. With one
factor, the method is OFT with the gains s. Convolutions and embeddings are rotated as in OFT.

As in OFT, the entries above the diagonal of K are trained; the permutations are views. side="outputs" rotates the
outputs, W' = diag(s) R W. LyCORIS does so too, but with the inverse rotation, and the coordinates of its blocks
alternate between the two halves. The defaults m = 2 and b = 8 are those of the language models in the paper.
`block_dropout` (`boft_dropout` in peft) is the share of the blocks of one factor that are not rotated in training. They
are drawn in each forward.

Parameters: m k b (b - 1) / 2 + out a site, k = in * kernel / b, times the number of experts.

Start: K at zero, s [out] at one: the identity.

Differs from the authors' code: The authors, whose code is in peft, train a full Q with K = (Q - Q^T) / 2. Without its
CUDA kernel peft uses only one factor. Its convolutions ignore dilation.

Use it: `peftcore.apply(model, "boft")`, where OFT's blocks are too narrow to mix all inputs that depend on each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    MATRICES,
    Held,
    LearningRate,
    Method,
    MethodConfig,
    Share,
    Site,
    Surgeon,
    Tags,
    WeightOperator,
)
from peftcore_reparameterized._dropped import replaced_blocks
from peftcore_reparameterized._gains import gained, with_gains
from peftcore_reparameterized._kernels import cayley, rotated
from peftcore_reparameterized._rotations import block_size, precise, rotate, rows, weight_of, width


class BOFTConfig(MethodConfig):
    """Options of BOFT."""

    method: Literal["boft"] = "boft"
    block_size: Annotated[int, Field(ge=2)] = 8
    """Width b of a block. At a site whose inputs cannot be split into such blocks, the nearest possible width is
    used."""
    factors: PositiveInt = 2
    """Number m of butterfly factors; b * 2^(m - 1) must divide the number of inputs of a site."""
    block_dropout: Share = 0.0
    """Share of the blocks of one factor that are not rotated in a forward in training. Their number is rounded down."""
    side: Literal["inputs", "outputs"] = "inputs"
    """Side of a weight that is rotated. For an embedding, the returned vectors are rotated with either value."""


WIDEST = 64
"""Up to this block width of the product of all factors, activations are rotated instead of the weight."""


class BOFTOperator(WeightOperator):
    """The rotation of one site and the gains of its outputs."""

    stackable = True

    def __init__(self, site: Site, config: BOFTConfig) -> None:
        super().__init__(site)
        self.outputs = config.side == "outputs"
        self.changes_inputs = not self.outputs
        self.dropout = config.block_dropout
        self.size = block_size(site, config.block_size, config.factors, self.outputs)
        self.span = self.size * 2 ** (config.factors - 1)
        blocks, entries = width(site, self.outputs) // self.size, self.size * (self.size - 1) // 2
        self.K = nn.Parameter(torch.zeros(*site.batch, config.factors, blocks, entries))
        self.gain = nn.Parameter(torch.ones(*site.batch, site.out_features))

    def rotations(self) -> Tensor:
        """Return the blocks of all factors, [*batch, factors, blocks, size, size]."""
        return cayley(precise(self.K), self.size)

    def dropped(self) -> Tensor:
        """Return the blocks of all factors; in training, some blocks of one factor are the identity."""
        R = self.rotations()
        if not (self.training and self.dropout):
            return R
        factors, blocks = R.shape[-4:-2]
        chosen = (torch.arange(factors) == torch.randint(factors, (1,), device="cpu")).to(R.device)
        replaced = chosen[:, None] & replaced_blocks(self.dropout, blocks, R.device)
        return torch.where(replaced[..., None, None], torch.eye(self.size, device=R.device, dtype=R.dtype), R)

    def turned(self, rows: Tensor, rotations: Tensor) -> Tensor:
        """Multiply rows [*batch, n, width] by R^T, one factor after the other."""
        for factor, R in enumerate(rotations.unbind(-4)):
            rows = _swap(rotate(_swap(rows, 2, 2**factor, self.size), R), 2**factor, 2, self.size)
        return rows

    def prefers_activation_form(self, x: Tensor) -> bool:
        return self.layer.of_vectors and not self.outputs and self.span <= WIDEST

    def prepare(self, held: Held) -> tuple[Tensor, Tensor | None]:
        """Return the factors as one rotation in wider blocks [blocks, span, span], and the bias."""
        blocks = held.weight.shape[-1] // self.span
        ones = torch.eye(self.span, device=self.K.device, dtype=self.K.dtype).repeat(1, blocks)
        return self.turned(ones, self.dropped()).unflatten(-1, (-1, self.span)).permute(1, 2, 0), held.bias

    def activation_form(self, call: Callable[..., Tensor], x: Tensor, prepared: tuple[Tensor, Tensor | None]) -> Tensor:
        R, bias = prepared
        return gained(self.layer, rotated(self.layer, call, x, R), self.gain, bias)

    def forward(self, weight: Tensor) -> Tensor:
        return self._turned(weight, self.dropped())

    def merged(self, weight: Tensor) -> Tensor:
        return self._turned(weight, self.rotations())

    def _turned(self, weight: Tensor, rotations: Tensor) -> Tensor:
        turned = self.turned(rows(weight, self.layer, self.outputs), rotations)
        return with_gains(weight_of(turned, self.layer, weight.shape, self.outputs), self.gain)


def _swap(rows: Tensor, one: int, other: int, size: int) -> Tensor:
    """Reorder the halves of blocks: make halves at the distance 2^factor neighbours, or restore the original order."""
    if one == 1 or other == 1:  # neighbours already
        return rows
    return rows.unflatten(-1, (-1, one, other, size // 2)).transpose(-3, -2).flatten(-4)


class BOFT(Method):
    """Butterfly orthogonal fine-tuning."""

    name = "boft"
    Config = BOFTConfig
    tags = Tags(category="reparameterized", paper="2311.06243", mergeable=True)
    learning_rate = LearningRate(1e-4, "arXiv 2311.06243, appendix A.3", on="Llama-2-7B, Alpaca")
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: BOFTConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, BOFTOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: BOFTConfig) -> int:
        outputs = config.side == "outputs"
        size = block_size(site, config.block_size, config.factors, outputs)
        rotations = config.factors * width(site, outputs) // size * size * (size - 1) // 2
        return math.prod(site.batch) * (rotations + site.out_features)
