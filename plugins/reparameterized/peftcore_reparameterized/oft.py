"""OFT: orthogonal fine-tuning.   Qiu et al. 2023, arXiv 2306.07280.

Equation:
    W' = W R^T,   R = diag(R_1, ..., R_k),   R_j = (I - K_j) (I + K_j)^-1,   K_j skew-symmetric [b, b]

The inputs of a weight are rotated in blocks of b, so the lengths of its rows and the angles between them are unchanged.
In a convolution, the inputs are all entries of the kernel, channel by channel; in a grouped one, those of the channels
of a group. In an embedding, the returned vector is rotated. As in peft, the entries above the diagonal of K are
trained.

With `series`, R_j is I - 2 K + 2 K^2 - 2 K^3 ... +- K^(series - 1) instead. This needs no linear solve, but is
orthogonal only for small K. The series with five terms is the default of peft, where it rotates in the opposite
direction, with -K instead of K. With `eps` (COFT), each K_j is scaled down to a norm of at most eps b^2 / sqrt(k), as
in the authors' code; peft omits b^2. The gradient is taken at the scaled K_j, as in the authors' code and in peft,
where each forward overwrites the parameter.

With side="outputs" the outputs of a weight are rotated instead, W' = R W and k = out / b; the bias is not rotated.
LyCORIS (its diag-oft, Yeh et al. 2023, arXiv 2309.14859; the preset `diag_oft`) and sd-scripts of kohya do this too.
Two options are from these libraries. With `constraint`, all K of a site together are scaled down to a norm of at most
constraint * width of the rotated side, and the scaling is differentiated. With `rescaled`, W' = diag(s) R W, with gains
s [out]. `block_dropout` is the share of blocks that are not rotated in training. They are drawn in each forward.

Parameters: k b (b - 1) / 2 a site, k = in * kernel / b, times the number of experts; with `block_share` those of a
single block, with `rescaled` out more.

Start: K at zero, s at one: the identity.

Differs from the authors' code: The authors train a full Q with K = (Q - Q^T) / 2, for which Adam changes K by the same
steps. In the authors' convolution, rows mix entries of several outputs. peft folds the patches of a rotated image back
together, which is wrong for kernels above 1. It also treats inputs of four dimensions as images, rotates embeddings in
the opposite direction, and does not implement its option module_dropout. LyCORIS trains a full Q with K = Q - Q^T, for
which Adam changes K by steps twice as large.

Use it: `peftcore.apply(model, "oft")`, where fine-tuning must preserve the knowledge of the base, as in subject-driven
diffusion or with little data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, PositiveFloat, model_validator
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
from peftcore_reparameterized._kernels import cayley, neumann, rotated
from peftcore_reparameterized._rotations import block_size, each_within, precise, rotate, rows, weight_of, width, within


class OFTConfig(MethodConfig):
    """Options of OFT."""

    method: Literal["oft"] = "oft"
    block_size: Annotated[int, Field(ge=2)] = 32
    """Width b of a block. At a site whose inputs it does not divide, the nearest width that does is used."""
    block_share: bool = False
    """One rotation for all blocks of a site."""
    eps: PositiveFloat | None = None
    """Upper bound of the deviation of R from the identity (COFT), such as 6e-5. With None there is no bound."""
    series: Annotated[int, Field(ge=4, le=100)] | None = None
    """Number of terms of a Neumann series that replaces the exact transform. With None the exact transform is used."""
    block_dropout: Share = 0.0
    """Share of the blocks that are not rotated in a forward in training. Their number is rounded down. It has no effect
    with `block_share`."""
    side: Literal["inputs", "outputs"] = "inputs"
    """Side of a weight that is rotated. For an embedding, the returned vectors are rotated with either value."""
    constraint: PositiveFloat | None = None
    """Upper bound of the norm of all K of a site, divided by the width of the rotated side (LyCORIS). With None there
    is no bound."""
    rescaled: bool = False
    """Train a gain for each output as well; a bias is not scaled."""

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if self.eps is not None and self.constraint is not None:
            raise ValueError("eps and constraint both limit the rotations: set one of them to None")
        return self


class OFTOperator(WeightOperator):
    """The rotation of one site."""

    stackable = True

    def __init__(self, site: Site, config: OFTConfig) -> None:
        super().__init__(site)
        self.outputs = config.side == "outputs"
        self.changes_inputs = not self.outputs
        blocks, self.size = _blocks(site, config)
        self.series, self.dropout = config.series, config.block_dropout
        self.radius = None if config.eps is None else config.eps * self.size**2 / math.sqrt(blocks)
        self.times = width(site, self.outputs) // (blocks * self.size)  # how often each block turns
        self.limit = None if config.constraint is None else config.constraint * width(site, self.outputs)
        self.K = nn.Parameter(torch.zeros(*site.batch, blocks, self.size * (self.size - 1) // 2))
        self.gain = nn.Parameter(torch.ones(*site.batch, site.out_features)) if config.rescaled else None

    def entries(self) -> Tensor:
        """Return the entries above the diagonals of K, [*batch, blocks, entries], scaled down if it is constrained."""
        entries = precise(self.K)
        if self.limit is not None:
            return within(entries, self.limit, self.times)
        return entries if self.radius is None else each_within(entries, self.radius)

    def prefers_activation_form(self, x: Tensor) -> bool:
        return self.layer.of_vectors and not self.outputs

    def rotation(self) -> Tensor:
        """Return R, block by block, [*batch, blocks, size, size]."""
        if self.series is None:
            return cayley(self.entries(), self.size)
        return neumann(self.entries(), self.size, self.series)

    def dropped(self) -> Tensor:
        """Return R; in training, some blocks of it are the identity."""
        R = self.rotation()
        if not (self.training and self.dropout) or R.shape[-3] == 1:
            return R
        replaced = replaced_blocks(self.dropout, R.shape[-3], R.device)
        return torch.where(replaced[:, None, None], torch.eye(self.size, device=R.device, dtype=R.dtype), R)

    def prepare(self, held: Held) -> tuple[Tensor, Tensor | None]:
        return self.dropped(), held.bias

    def activation_form(self, call: Callable[..., Tensor], x: Tensor, prepared: tuple[Tensor, Tensor | None]) -> Tensor:
        R, bias = prepared
        y = rotated(self.layer, call, x, R, exact=self.series is None)
        return y if self.gain is None else gained(self.layer, y, self.gain, bias)

    def forward(self, weight: Tensor) -> Tensor:
        return self._turned(weight, self.dropped())

    def merged(self, weight: Tensor) -> Tensor:
        return self._turned(weight, self.rotation())

    def _turned(self, weight: Tensor, R: Tensor) -> Tensor:
        turned = rotate(rows(weight, self.layer, self.outputs), R)
        turned = weight_of(turned, self.layer, weight.shape, self.outputs)
        return turned if self.gain is None else with_gains(turned, self.gain)


class OFT(Method):
    """Orthogonal fine-tuning."""

    name = "oft"
    Config = OFTConfig
    tags = Tags(category="reparameterized", paper="2306.07280", mergeable=True)
    learning_rate = LearningRate(
        6e-5, "Zeju1997/oft@df2b263, oft-db/train_dreambooth_oft.sh", on="Stable Diffusion 1.5, DreamBooth"
    )
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: OFTConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, OFTOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: OFTConfig) -> int:
        blocks, size = _blocks(site, config)
        gains = site.out_features if config.rescaled else 0
        return math.prod(site.batch) * (blocks * size * (size - 1) // 2 + gains)


def _blocks(site: Site, config: OFTConfig) -> tuple[int, int]:
    """Return the number of blocks with a separate rotation, and their width."""
    outputs = config.side == "outputs"
    size = block_size(site, config.block_size, outputs=outputs)
    return (1 if config.block_share else width(site, outputs) // size), size
