"""VeLoRA: low-rank adaptation with compressed inputs.   Miles et al. 2024, arXiv 2405.17991 (roymiles/VeLoRA).

Equation:
    y = W x + b + s B A dropout(x)   as in LoRA,   s = alpha / rank
    dL/dA = (dL/dz)' x~,   z = A x,   x~ = c [v v' x_1, ..., v v' x_g]   with x in g groups,   |v| = 1

For backward, training stores one number for each group of inputs instead of the inputs. The gradient of A is computed
from x~ instead of x. Outputs and all other gradients are those of LoRA. v is the direction of the mean of all groups,
over all tokens that are not padding. With projection="first", as in the authors' code, v is computed from the first
batch and saved in the file. With projection="each", the default of peft, it is computed from each batch and not saved.
With projection="random" it is drawn. c is `rebuilt_scale`. With dropout, x are the inputs after dropout.

If `in` is not a multiple of g, the last group is padded with zeros. VeLoRA supports only linear layers that are called.
If the effective weight is computed (`low_memory`), A gets its exact gradient.

Parameters: rank * (in + out) a site.

Start: As in LoRA: A uniform in +-1/sqrt(in), B at zero: the identity.

Differs from the authors' code: In the authors' code and in peft, v also depends on padding. The authors' code requires
`in` to be a multiple of g, and also compresses the inputs of whole layers that train. Here only the inputs of the
update are compressed, as in peft.

Use it: `peftcore.apply(model, "velora")`, instead of LoRA where the stored inputs of the adapted layers need too much
memory, and no other operation stores them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    MATRICES,
    LearningRate,
    Method,
    MethodConfig,
    Operator,
    Share,
    Site,
    Surgeon,
    Tags,
    by_row,
    sees_vectors,
)
from peftcore.errors import UnsupportedSite
from peftcore_reparameterized._low_rank import add_low_rank, low_rank_count, low_rank_factors


class VeLoRAConfig(MethodConfig):
    """Options of VeLoRA."""

    method: Literal["velora"] = "velora"
    rank: PositiveInt = 32
    """Rank of the update."""
    alpha: PositiveFloat = 16.0
    """Numerator of the scale ``alpha / rank``."""
    dropout: Share = 0.0
    """Probability with which inputs of the update are dropped in training."""
    num_groups: PositiveInt = 32
    """Number g of values that are stored for the input of each token. With more of them, the gradient of A is more
    exact."""
    projection: Literal["first", "each", "random"] = "first"
    """Source of v: the first batch, each batch, or a random draw."""
    rebuilt_scale: PositiveFloat = 0.1
    """The factor c of the rebuilt inputs."""


def in_groups(x: Tensor, groups: int) -> Tensor:
    """Return inputs ``[..., in]`` as ``[tokens, groups, size]``, padded with zeros at the end."""
    size = -(-x.shape[-1] // groups)
    return F.pad(x, (0, groups * size - x.shape[-1])).reshape(-1, groups, size)


def direction(x: Tensor, groups: int) -> Tensor:
    """Return v, ``[size]``: the direction of the mean of all groups, over tokens that are not padding. If the mean is
    zero, all entries of v are equal."""
    tokens, counts, _ = by_row(x.detach())  # [rows, tokens, in], [rows, tokens]
    kept = tokens if counts is None else tokens * counts.unsqueeze(-1)
    mean = in_groups(kept, groups).flatten(0, 1).mean(0).to(torch.promote_types(x.dtype, torch.float32))
    return F.normalize(torch.where(mean.any(), mean, 1.0), dim=0)


class _Compressed(torch.autograd.Function):
    """Computes ``x A'``, and saves only one number for each group of x for the gradient of A."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, v: Tensor, groups: int, scale: float) -> Tensor:
        ctx.save_for_backward(in_groups(x, groups) @ v, A, v)  # [tokens, groups]
        ctx.scale, ctx.shape = scale, x.shape
        return x @ A.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # [..., rank]
        kept, A, v = ctx.saved_tensors
        of_x = gradient @ A if ctx.needs_input_grad[0] else None
        rebuilt = (kept.unsqueeze(-1) * v).flatten(1)[:, : ctx.shape[-1]] * ctx.scale  # [tokens, in]
        return of_x, gradient.reshape(-1, gradient.shape[-1]).T @ rebuilt, None, None, None


class VeLoRAOperator(Operator):
    """The update of one linear layer, and the direction v onto which the stored inputs are projected."""

    training_only = frozenset({"dropout", "groups", "projection", "rebuilt_scale"})
    padded, scaled = frozenset({"A", "B"}), frozenset({"B"})
    v: Tensor

    def __init__(self, site: Site, config: VeLoRAConfig) -> None:
        super().__init__(site)
        self.dropout, self.projection = config.dropout, config.projection
        self.groups = min(config.num_groups, site.in_features)  # more would be empty
        self.rebuilt_scale, self.scale = config.rebuilt_scale, config.alpha / config.rank
        self.A, self.B = low_rank_factors(site, config.rank)  # [rank, in], [out, rank]
        size = -(-site.in_features // self.groups)
        self.register_buffer(
            "v", F.normalize(torch.randn(size), dim=0) if self.projection == "random" else torch.zeros(size)
        )

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:  # x [..., in]
        y = call(x)
        A, B = self.cast(y, self.A, self.B)
        if not self.training:
            return y + self.layer.mix(self.scale * self.layer.apply(x, A), B)
        x = F.dropout(x, self.dropout) if self.dropout else x
        v = self.v
        if self.projection != "random":
            new = direction(x, self.groups)
            if self.projection == "first":
                v = torch.where(v.any(), v, new.to(v))
                with torch.no_grad():
                    self.v.copy_(v)
            else:
                v = new
        low = _Compressed.apply(x, A, v.to(x.dtype), self.groups, self.rebuilt_scale)
        return y + self.layer.mix(self.scale * low, B)

    def merged(self, weight: Tensor) -> Tensor:
        return add_low_rank(weight, self.A, self.scale * self.B)


class VeLoRA(Method):
    """Low-rank adaptation with compressed inputs."""

    name = "velora"
    Config = VeLoRAConfig
    tags = Tags(category="reparameterized", paper="2405.17991", mergeable=True, exact_gradient=False)
    learning_rate = LearningRate(4e-4, "roymiles/VeLoRA@a6415bc, scripts/finetune_llama_7b.sh", on="LLaMA-7B, Alpaca")
    target = ("attn.v", "mlp.down")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: VeLoRAConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            if not sees_vectors(site):
                raise UnsupportedSite(
                    f"{site.path} is not a linear layer that is called, so it keeps no inputs to compress; use lora"
                )
            surgeon.graft(site, VeLoRAOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: VeLoRAConfig) -> int:
        return low_rank_count(site, config.rank)
