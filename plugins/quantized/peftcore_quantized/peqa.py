"""PEQA: only the scales of quantized weights train.   Kim et al. 2023, arXiv 2305.14152 (no code of the authors).

Equation:
    y = W x + b,   W = (s0 + ds) (q - z) = Q (1 + ds / s0),   Q = round(W0) = s0 (q - z)

ds [out, groups] is one number for each row, or for each `group_size` inputs of a row. Codes q and zeros z are
unchanged. The model may be quantized by any scheme. Schemes have different kinds of scales, so s0 is defined in the
same way for all of them: the largest |Q| of the group, divided by 2^(bits - 1) - 1. The quantized weight is multiplied
by 1 + ds / s0. With another s0 the same weights are reached by another ds, so s0 sets only the unit of the learning
rate.

Some formats scale a block by its largest value (nf4, int8, int4). For these, a merge with into="same" keeps the codes
if each block is inside one group. Then only the scales change, and the merge is exact.

Parameters: out * groups a site, times the number of experts.

Start: ds at zero: an identity on a model that is quantized already; a dense model is rounded.

Differs from the authors' code: The authors published no code. s0 is defined for all schemes alike, so it sets only the
unit of the learning rate.

Use it: `peftcore.apply(model, "peqa")`, where tasks share one quantized model and each should store only a vector for
each layer. The paper's learning rates are 1e-5 to 6e-5. Weight decay is off.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from peftcore.author import AppliedMethod, Method, Site, Surgeon, Tags
from peftcore_quantized._packed_base import HeldOperator, SchemeConfig, group_count, on_weight


class PEQAConfig(SchemeConfig):
    """Options of PEQA."""

    method: Literal["peqa"] = "peqa"
    group_size: PositiveInt | None = None
    """Number of inputs that share a scale; it divides the number of inputs. With None all inputs of a row share one."""
    bits: Annotated[int, Field(ge=2, le=8)] = 4
    """The number of bits in the definition of s0."""


class PEQAOperator(HeldOperator):
    """The trained change ds of one site's scales, and the initial scales s0 (a buffer)."""

    s0: Tensor

    def __init__(self, site: Site, config: PEQAConfig) -> None:
        super().__init__(site, config)
        self.groups = group_count(site, config.group_size)
        with torch.no_grad():
            weight = site.weight()
            held = self.held(weight.to(torch.promote_types(weight.dtype, torch.float32)))
            largest = self.grouped(held).abs().amax(-1)  # [*batch, out, groups]
        self.register_buffer("s0", torch.where(largest == 0, 1.0, largest) / (2 ** (config.bits - 1) - 1))
        self.ds = nn.Parameter(torch.zeros_like(self.s0))

    def wrong_values(self, values: Mapping[str, Tensor]) -> Iterator[str]:
        s0 = values.get("s0")
        if s0 is not None and not (s0.gt(0).all() and (values.get("ds", s0) / s0).isfinite().all()):
            yield "s0 holds scales that are not positive, or ds is present without s0"

    def grouped(self, weight: Tensor) -> Tensor:
        """Group inputs: ``[*batch, out, in, *kernel] -> [*batch, out, groups, group_size]``."""
        return weight.flatten(self.layer.batch_dims + 1).unflatten(-1, (self.groups, -1))

    def merged(self, weight: Tensor) -> Tensor:
        gain = 1 + self.ds / self.s0
        return (self.grouped(self.held(weight)) * gain.unsqueeze(-1)).view(weight.shape)


class PEQA(Method):
    """Only the scales of quantized weights train."""

    name = "peqa"
    Config = PEQAConfig
    tags = Tags(
        category="quantized",
        paper="2305.14152",
        mergeable=True,
        identity_at_init=False,
    )
    target = ("all-linear",)
    alternatives = ("all-layers",)

    def inject(self, model: nn.Module, config: PEQAConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(on_weight(site), PEQAOperator, config)

    def parameter_groups(self, injection: AppliedMethod, *, lr: float, **defaults: Any) -> list[dict[str, Any]]:
        changes = (graft.operator.get_parameter("ds") for graft in injection.grafts if graft.by_method)
        trained = [ds for ds in changes if ds.requires_grad]
        return [{"params": trained, **defaults, "lr": lr, "weight_decay": 0.0}]

    @staticmethod
    def parameter_count(site: Site, config: PEQAConfig) -> int:
        return math.prod(site.batch) * site.out_features * group_count(site, config.group_size)
