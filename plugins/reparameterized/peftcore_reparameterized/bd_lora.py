"""BD-LoRA: low-rank adaptation with block-diagonal factors.   Wang et al. 2025, arXiv 2510.23346.

Equation:
    y = W x + b + s B A dropout(x),   s = alpha / rank,   of which A or B is block diagonal, with n blocks

    A = diag(A_1 … A_n),  A_i [rank / n, in / n]     in `cut_inputs`: what tensor parallelism shards by inputs
    B = diag(B_1 … B_n),  B_i [out / n, rank / n]    elsewhere: what it shards by outputs

A server with tensor parallelism over n devices shards queries, keys, values, gates and up-projections by outputs, and
the matrices after them by inputs. It can shard the factors in the same way. Then each device has whole blocks, and no
device waits for another device's part of A x. With n = 1 the method is LoRA.

n must divide the rank, and the inputs or outputs of each target module. Blocks of a convolution contain whole kernels.
The tokens of an embedding are not split into blocks. Each expert has separate factors.

Parameters: rank * (in * kernel / n + out) a site, or rank * (in * kernel + out / n), times the number of experts.

Start: B at zero: the identity. An A without blocks starts as in LoRA. Blocks of A start as in peft, uniform in +-sqrt(6
n / in).

Differs from the authors' code: The authors' code was not compared; peft was. peft supports linear layers only, and
selects the block-diagonal factor by names of modules (`target_modules_bd_a`, `target_modules_bd_b`).

Use it: `peftcore.apply(model, "bd_lora")`, instead of LoRA where many adapters are served on several devices; n is the
number of devices.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from peftcore.author import MATRICES, Method, MethodConfig, Share, Site, Surgeon, Tags
from peftcore.errors import UnsupportedSite
from peftcore_reparameterized._low_rank import LowRankOperator, low_rank_factors


class BDLoRAConfig(MethodConfig):
    """Options of BD-LoRA."""

    method: Literal["bd_lora"] = "bd_lora"
    rank: PositiveInt = 8
    """Rank of the update; `blocks` must divide it."""
    alpha: PositiveFloat = 8.0
    """Numerator of the scale ``alpha / rank``."""
    scaling: Literal["rank", "sqrt_rank"] = "rank"
    """Denominator of the scale: the rank, or its square root (rsLoRA)."""
    blocks: PositiveInt = 2
    """Number n of blocks of the block-diagonal factor. Set it to the number of devices that will serve the model."""
    cut_inputs: list[str] = Field(
        default_factory=lambda: ["attn.out", "cross.out", "attn_mlp.out", "mlp.down", "experts.down", "ssm.out"]
    )
    """Sites at which A is block diagonal; at all others B is. An entry is a role, or a glob for site paths
    (`target_modules_bd_a` in peft)."""
    dropout: Share = 0.0
    """Probability with which inputs of the update are dropped in training."""

    @model_validator(mode="after")
    def _check_blocks(self) -> BDLoRAConfig:
        if self.rank % self.blocks:
            raise ValueError(f"rank={self.rank} is not a multiple of blocks={self.blocks}; set one that is")
        return self


def cuts_input(site: Site, config: BDLoRAConfig) -> bool:
    """Whether A is the factor that is block diagonal."""
    return any(site.role == each or fnmatch.fnmatchcase(site.path, each) for each in config.cut_inputs)


class BDLoRAOperator(LowRankOperator):
    """The factors of one target module's update, one of them in blocks."""

    def __init__(self, site: Site, config: BDLoRAConfig) -> None:
        super().__init__(site, config.dropout)
        n, self.cut_A = config.blocks, cuts_input(site, config)
        width, what = (site.in_features, "inputs") if self.cut_A else (site.out_features, "outputs")
        if self.cut_A and n > 1 and site.layer.one_hot:
            raise UnsupportedSite(
                f"{site.path} is an embedding, whose tokens cannot be split into blocks; remove it from cut_inputs"
            )
        if width % n:
            raise UnsupportedSite(
                f"{site.path} has {width} {what}, which blocks={n} does not divide; set another number for it with "
                "overrides=, or exclude the site"
            )
        self.blocks = n
        self.scale = config.alpha / (config.rank if config.scaling == "rank" else math.sqrt(config.rank))
        A, B = low_rank_factors(site, config.rank)  # [rank, in], [out, rank]
        if self.cut_A and n > 1:
            bound = math.sqrt(6 * n / math.prod((site.in_features, *site.kernel)))
            A = nn.Parameter(A.detach().narrow(len(site.batch) + 1, 0, width // n).clone().uniform_(-bound, bound))
        elif n > 1:
            B = nn.Parameter(B.detach()[..., : config.rank // n].clone())
        self.A, self.B = A, B

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Return both factors as full matrices, with zeros outside the blocks."""
        dim = self.layer.batch_dims
        if self.blocks == 1:
            return self.A, self.B, self.scale
        if self.cut_A:
            return self._diagonal(self.A, dim), self.B, self.scale
        return self.A, self._diagonal(self.B, dim), self.scale

    def _diagonal(self, blocks: Tensor, dim: int) -> Tensor:
        """Return blocks ``[*batch, n * rows, columns, *kernel]`` as a block-diagonal matrix, ``[*batch, n * rows, n *
        columns, *kernel]``."""
        n = self.blocks
        same = torch.eye(n, dtype=blocks.dtype, device=blocks.device)
        apart = blocks.unflatten(dim, (n, -1)).unsqueeze(dim + 2)  # [*batch, n, rows, 1, columns, *kernel]
        whole = apart * same.view(n, 1, n, *[1] * (apart.dim() - dim - 3))
        return whole.flatten(dim + 2, dim + 3).flatten(dim, dim + 1)

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        if not self.layer.of_vectors or self.layer.batch_dims or self.blocks == 1:
            return super().forward(call, x)
        y = call(x)
        A, B = self.cast(y, self.A, self.B)
        dropped = nn.functional.dropout(x, self.input_dropout) if self.training and self.input_dropout else x
        low = self._apart(dropped, A) if self.cut_A else self.layer.apply(dropped, A)
        return y + (self.layer.mix(self.scale * low, B) if self.cut_A else self._apart(self.scale * low, B))

    def _apart(self, x: Tensor, blocks: Tensor) -> Tensor:
        """Multiply each part of the vectors by its own block."""
        parts = x.unflatten(-1, (self.blocks, -1))
        return torch.einsum("...ni,noi->...no", parts, blocks.unflatten(0, (self.blocks, -1))).flatten(-2)


class BDLoRA(Method):
    """Low-rank adaptation with a factor in blocks."""

    name = "bd_lora"
    Config = BDLoRAConfig
    tags = Tags(category="reparameterized", paper="2510.23346", mergeable=True, low_rank=True)
    target = ("attn.*", "cross.*", "mlp.gate", "mlp.up", "mlp.down")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: BDLoRAConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, BDLoRAOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: BDLoRAConfig) -> int:
        inputs, out = site.in_features * math.prod(site.kernel), site.out_features
        inputs, out = (inputs // config.blocks, out) if cuts_input(site, config) else (inputs, out // config.blocks)
        return math.prod(site.batch) * config.rank * (inputs + out)
