"""PEQA: only the scales of quantized weights train.   Kim et al. 2023, arXiv 2305.14152 (no code of the authors).

Equation:
    y = W x + b,   W = (s0 + ds) (q - z) = Q (1 + ds / s0),   Q = round(W0) = s0 (q - z)

ds [out, groups] is one number for each row, or for each `group_size` inputs of a row. Codes and zeros are unchanged. A
model may be quantized by any scheme, and schemes have different kinds of scales; so s0 is defined alike for all of
them, as the largest |Q| of the group over 2^(bits - 1) - 1, and the base is multiplied. Another s0 reaches the same
weights by another ds: s0 sets only the unit of the learning rate.

A merge into="same" of formats that scale by the largest values of a block (nf4, int8, int4) keeps the codes, where each
block is inside one group: only the scales change, and the merge is exact.

Parameters: out * groups a site, times the number of experts.

Start: ds at zero: an identity on a model that is quantized already; a dense model is rounded.

Differs from the authors' code: The authors published no code. s0 is defined for all schemes alike, so it sets only the
unit of the learning rate.

Use it: `peftcore.apply(model, "peqa")`, where a task should cost as little as a vector a layer, on one quantized model
that all tasks share; the paper's learning rates are 1e-5 to 6e-5. Weight decay is off.
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
    """How many inputs share a scale; divides their number. None: all of a row."""
    bits: Annotated[int, Field(ge=2, le=8)] = 4
    """Bits of the codes in whose steps s0 counts."""


class PEQAOperator(HeldOperator):
    """The change of one site's scales, and the scales that it starts from (a buffer)."""

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
