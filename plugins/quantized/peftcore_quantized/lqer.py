"""LQER: a low-rank correction of the error of rounding.   Zhang et al. 2024, arXiv 2402.02446 (ChengZhang-98/lqer).

Equation:
    E = W - round(W),   E diag(x) = U S V',   B A = U_r S_r V_r' diag(1 / x),   y = round(W) x + b + B A x
    x_i = the largest mean of |input i| of all batches, at least 0.0001

This is the paper's variant L2QER, which weights the error of each input by the size of that input. The sizes are
measured on ``data=``, which needs no labels and no gradient. If all x are equal, the result is LQER, which is also the
start of LoftQ with one iteration. By default A and B are frozen, as in the paper: the adapter corrects a quantized
model, and a trained adapter can be installed on top of it. Each direction of A and B is rounded to 8 bits in blocks of
16 values, which share a scale in floating point. The rounded values are stored in floating point.

Inputs are those of the dense base, measured at modules that are called. Tensors that another module reads (experts, an
attention's fused projection) and grouped convolutions get LQER. At an embedding, x is the frequency of each token. In a
convolution, all positions of the kernel share the x of their channel.

If ``peftcore.quantize(model, scheme)`` is called after `apply`, it stores round(W), as another library does with this
scheme. The adapter's file fits both models.

Parameters: none; with ``train_factors=True`` rank * (in * kernel + out) a site, times the number of experts.

Start: A and B at the correction: outputs are close to those of W, not equal. On a model that is quantized already, the
original weight is lost and the error is unknown: A and B are zero.

Differs from the authors' code: Here the scale of a block is in floating point; in the authors' code it is a power of
two. The authors' blocks of B contain values of several directions. In their code nothing trains; here
``train_factors=True`` trains A and B.

Use it: `peftcore.apply(model, "lqer", data=batches)`, for a quantized model that has to be good without training.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from peftcore.author import AppliedMethod, Batches, Method, Site, Surgeon, Tags
from peftcore_quantized._packed_base import (
    Factors,
    PackedBaseOperator,
    PackedConfig,
    as_factors,
    original,
    place,
    principal,
    round_weight,
    update_count,
)

LEAST = 1e-4
"""Lower bound of the size of an input. It avoids a division by zero for inputs that are always zero."""


class LQERConfig(PackedConfig):
    """Options of LQER."""

    method: Literal["lqer"] = "lqer"
    rank: PositiveInt = 32
    """Rank of the correction."""
    factor_bits: Annotated[int, Field(ge=2, le=8)] | None = 8
    """Number of bits to which A and B are rounded; None leaves them unrounded."""
    train_factors: bool = False
    """Whether A and B train, starting from the computed correction."""


def in_blocks(factor: Tensor, bits: int, size: int = 16) -> Tensor:
    """Return the factor with its values rounded to `bits` bits, in blocks of `size` along the last dimension."""
    blocks = F.pad(factor, (0, -factor.shape[-1] % size)).unflatten(-1, (-1, size))
    unit = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30) / (2 ** (bits - 1) - 1)
    return ((blocks / unit).round() * unit).flatten(-2)[..., : factor.shape[-1]]


def sizes(site: Site, x: Tensor) -> Tensor:
    """Return the mean of |x| for each input of a module, [in]; at an embedding, the frequency of each token."""
    if site.layer.one_hot:
        return torch.bincount(x.flatten(), minlength=site.in_features) / max(1, x.numel())
    if x.is_nested:  # an encoder's padded sequences
        x = torch.cat(x.unbind())
    return site.layer.channels_last(x).flatten(0, -2).abs().float().mean(0)


class LQEROperator(PackedBaseOperator):
    """The correction of one weight. It is zero until `correct` computes it."""

    def __init__(self, site: Site, config: LQERConfig) -> None:
        A = torch.zeros(*site.batch, config.rank, site.in_features, *site.kernel)
        start = Factors(A, torch.zeros(*site.batch, site.out_features, config.rank))
        super().__init__(site, config, start)
        for name, tensor in start._asdict().items() if not config.train_factors else ():
            delattr(self, name)
            self.register_buffer(name, tensor)

    def correct(self, site: Site, config: LQERConfig, x: Tensor | None) -> None:
        """Compute A and B from the weight and the sizes of its inputs; without sizes, all inputs count equally."""
        weight = original(site)
        gap = weight - round_weight(self.rounding, weight, self.layer.batch_dims)
        columns = gap.new_ones(site.in_features) if x is None else x.to(gap).clamp_min(LEAST)
        columns = columns.repeat_interleave(math.prod(site.kernel))
        A, B = principal(gap * columns, config.rank)
        A = A / columns
        if config.factor_bits is not None:
            A, B = in_blocks(A, config.factor_bits), in_blocks(B.mT, config.factor_bits).mT
        for own, new in zip((self.A, self.B), as_factors(site, A, B), strict=True):
            own.copy_(new)


class LQER(Method):
    """A low-rank correction of the error of rounding."""

    name = "lqer"
    Config = LQERConfig
    tags = Tags(category="quantized", paper="2402.02446", mergeable=True, identity_at_init=False, needs_data=True)
    target = ("all-linear",)
    alternatives = ("all-layers",)

    def inject(self, model: nn.Module, config: LQERConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(place(site), LQEROperator, config)

    def calibrate(self, model: nn.Module, data: Batches, config: LQERConfig, injection: AppliedMethod) -> None:
        grafts: list[Any] = [each for each in injection.grafts if each.by_method and not each.site.layer.packed]
        called = {graft.site.module: graft.site for graft in grafts if graft.site.layer.called}
        seen: dict[nn.Module, Tensor] = {}

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = sizes(called[module], next(iter((*args, *kwargs.values()))))
            seen[module] = torch.maximum(seen.get(module, x), x)

        model.eval()
        with injection.whole.disabled(), torch.no_grad():
            with ExitStack() as hooks:
                for module in called:
                    hooks.callback(module.register_forward_pre_hook(look, with_kwargs=True).remove)
                for batch in data:
                    batch.output()
            for graft in grafts:
                x = seen.get(graft.site.module) if graft.site.layer.called else None
                graft.operator.correct(graft.site, config.at(graft.site.path), x)

    @staticmethod
    def parameter_count(site: Site, config: LQERConfig) -> int:
        return update_count(site, config.rank) if config.train_factors else 0
