"""RoAd: 2D rotary adaptation.   Liao and Monz 2024, arXiv 2409.00119.

Equation:
    y = W x + b
    (y1, y2)  ->  (a1 cos(t1) y1 - a2 sin(t2) y2,   a3 sin(t3) y1 + a4 cos(t4) y2)

The outputs of a layer are rotated in pairs, and their lengths are scaled. With variant=1, all four angles t of a pair
are equal, and so are the lengths a, so the pair is rotated and scaled. With variant=2, each output has one angle and
one length: t1 = t2 and t3 = t4. With variant=4, all are independent. The bias is rotated too: the merged weight is R W,
with the bias R b.

Outputs are split into groups. An output in the first half of a group is paired with the output at the same position in
the second half. With a `group_size` of 2, as in the paper, neighbours are a pair. The default of peft is 64.

In a convolution the channels are rotated, and in an embedding the returned vectors. Each expert has separate angles and
lengths.

Parameters: variant * out a site, times the number of experts.

Start: All t at zero and all a at one: the identity.

Differs from the authors' code: The authors' code was not compared; peft was. peft supports linear layers only.

Use it: `peftcore.apply(model, "road")`, where the rows of a batch use many adapters. The change is elementwise, and
needs no product with a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from peftcore.author import OUTPUTS, LearningRate, Method, MethodConfig, Operator, Site, Surgeon, Tags, on_first
from peftcore.errors import UnsupportedSite


class RoAdConfig(MethodConfig):
    """Options of RoAd."""

    method: Literal["road"] = "road"
    variant: Literal[1, 2, 4] = 1
    """Number of parameters for each output. 1: one angle and one length for each pair. 2: for each output. 4: for each
    entry of the 2 x 2 matrix of a pair."""
    group_size: Annotated[int, Field(ge=2, multiple_of=2)] = 2
    """Number of outputs in a group, whose first half is paired with its second half. With 2, neighbours are a pair."""


class RoAdOperator(Operator):
    """The rotations of one target module's outputs."""

    def __init__(self, site: Site, config: RoAdConfig) -> None:
        super().__init__(site)
        if site.out_features % config.group_size:
            raise UnsupportedSite(
                f"{site.path} has {site.out_features} outputs, which group_size={config.group_size} does not divide; "
                "set another one for it with overrides=, or exclude it"
            )
        self.variant, self.half_group, self.batch_dims = config.variant, config.group_size // 2, len(site.batch)
        count = config.variant * site.out_features // 2
        self.angle = nn.Parameter(torch.zeros(*site.batch, count))
        self.length = nn.Parameter(torch.ones(*site.batch, count))

    def columns(self) -> tuple[Tensor, Tensor]:
        """Return a cos(t) and a sin(t) of each output, [*batch, groups, 1 or 2, half]."""
        if self.variant == 4:  # first those of all cosines in a group, then those of its sines
            angle, length = (each.unflatten(-1, (-1, 2, 2, self.half_group)) for each in (self.angle, self.length))
            (cos, sin), (of_cos, of_sin) = angle.unbind(-3), length.unbind(-3)
            return of_cos * cos.cos(), of_sin * sin.sin()
        angle, length = (each.unflatten(-1, (-1, self.variant, self.half_group)) for each in (self.angle, self.length))
        return length * angle.cos(), length * angle.sin()

    def turned(self, y: Tensor, dim: int) -> Tensor:
        """Return `y` with its channels (the dimension `dim`) rotated in pairs."""
        pairs = y.unflatten(dim, (-1, 2, self.half_group))  # [..., groups, 2, half, ...]
        first, second = pairs.unbind(dim + 1)
        across = torch.stack([-second, first], dim + 1)
        cos, sin = (each.view(*each.shape, *[1] * (y.dim() - dim - 1)) for each in self.cast(y, *self.columns()))
        return (cos * pairs + sin * across).flatten(dim, dim + 2)

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return on_first(call(*args, **kwargs), lambda y: self.turned(y, y.dim() + self.layer.channel_dim))

    def merged(self, weight: Tensor) -> Tensor:  # [*batch, out, in, *kernel]
        return self.turned(weight, self.batch_dims)

    def merged_bias(self, bias: Tensor | None, weight: Callable[[], Tensor]) -> Tensor | None:  # [*batch, out]
        return None if bias is None else self.turned(bias, self.batch_dims)


class RoAd(Method):
    """Rotations of pairs of outputs."""

    name = "road"
    Config = RoAdConfig
    tags = Tags(category="reparameterized", paper="2409.00119", mergeable=True)
    learning_rate = LearningRate(3e-3, "arXiv 2409.00119, table C.5", on="LLaMA, commonsense")
    target = ("all-linear",)
    alternatives = OUTPUTS

    def inject(self, model: nn.Module, config: RoAdConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, RoAdOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: RoAdConfig) -> int:
        return math.prod(site.batch) * config.variant * site.out_features
