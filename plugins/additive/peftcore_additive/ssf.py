"""SSF: scaling and shifting features.   Lian et al. 2022, arXiv 2210.08823 (code: dongzelian/SSF).

Equation:
    y = gamma * f(x) + beta   after every operation f: linear layers, norms, convolutions; one number a channel

gamma and beta can be merged into W' = gamma * W and b' = gamma * b + beta; a layer without a bias gets one then.
Modules that cannot have a bias (RMSNorm, a stack of experts) are only scaled. Token tables and routers are skipped
unless `target` names them, since the authors' models do not have them.

Parameters: 2 out for each operation (out if it is only scaled), times the number of experts.

Start: gamma from N(1, 0.02) and beta from N(0, 0.02), as in the authors' code: a fresh injection changes the outputs a
little; ``init_std=0`` starts from the identity.

Differs from the authors' code: The head is not adapted. The authors train the whole head; pass ``train=["classifier"]``
to do so.

Use it: `peftcore.apply(model, "ssf")`, to adapt a vision model to a task with few examples, without cost at inference.
Train without weight decay, which pulls gamma to 0 instead of 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from peftcore.author import LearningRate, Method, MethodConfig, Operator, Site, Surgeon, Tags, bias_name, with_tensors


class SSFConfig(MethodConfig):
    """Options of SSF."""

    method: Literal["ssf"] = "ssf"
    init_std: NonNegativeFloat = 0.02
    """Standard deviation of gamma and beta at the start; 0 makes a fresh adapter an exact identity."""


def shifts(site: Site) -> bool:
    """Return True if the site can have beta: its module has an attribute for a bias, which may be None, or it is an
    embedding table."""
    return site.layer.one_hot or bias_name(site.tensor) in site.tensors()


class SSFOperator(Operator):
    """A scale and a shift for each channel."""

    stackable = True

    def __init__(self, site: Site, config: SSFConfig) -> None:
        super().__init__(site)
        shape = (*site.batch, site.out_features)
        self.gain = nn.Parameter(1 + config.init_std * torch.randn(shape))
        self.shift = nn.Parameter(config.init_std * torch.randn(shape)) if shifts(site) else None
        self.added = _added(site)

    def forward(self, call: Callable[..., Tensor], *args: Tensor) -> Tensor:
        y = call(*args)
        vectors = (self.gain,) if self.shift is None else (self.gain, self.shift)
        gain, *shift = (self.layer.along_channels(each, y) for each in self.cast(y, *vectors))
        return y * gain + shift[0] if shift else y * gain

    def merged(self, weight: Tensor) -> Tensor:
        gain = self._column(self.gain, weight)
        new = weight * gain if not self.added else weight * gain + self.added * (gain - 1)
        if self.shift is not None and self.layer.one_hot:
            new = new + self._column(self.shift, weight)
        return new

    def merged_bias(self, bias: Tensor | None, weight: Callable[[], Tensor]) -> Tensor | None:
        scaled = None if bias is None else bias * self.gain
        if self.shift is None or self.layer.one_hot:
            return scaled
        return self.shift.clone() if scaled is None else scaled + self.shift

    def _column(self, vector: Tensor, weight: Tensor) -> Tensor:
        return vector.view(*vector.shape, *[1] * (weight.dim() - vector.dim()))


def _added(site: Site) -> float:
    """Return the number that an RMSNorm adds to its weight before it multiplies: 1 in Gemma, 0 in most models.

    The module is run with a weight of zero to find out. If it adds 0, the output is zero.
    """
    weight = site.layer.read(site.module, site.tensor)
    if site.meta or shifts(site) or weight is None or weight.dim() != 1 or weight.is_meta:
        return 0.0
    norm = with_tensors(site.module, {site.tensor: torch.zeros_like(weight)})
    x = torch.linspace(-1, 1, len(weight) + 1, dtype=weight.dtype, device=weight.device)[None, 1:]
    try:
        return float(norm.forward(x).any())
    except (AttributeError, TypeError):  # norms with a gate want a second input; they add nothing
        return 0.0


class SSF(Method):
    """Learned scales and shifts after every operation."""

    name = "ssf"
    Config = SSFConfig
    tags = Tags(
        category="additive",
        paper="2210.08823",
        mergeable=True,
        identity_at_init=False,
        identity_options={"init_std": 0.0},
    )
    learning_rate = LearningRate(
        1e-3, "dongzelian/SSF@e94e0e7, train_scripts/vit/imagenet_1k/train_ssf.sh", on="ViT-B/16, ImageNet"
    )
    target = ("*", "all-linear", "experts.*")

    def inject(self, model: nn.Module, config: SSFConfig, surgeon: Surgeon) -> None:
        found = surgeon.sites()
        sites = [site for site in found if site.layer.has(site.module, site.tensor)] or found
        for site in sites if surgeon.wishes.target is not None else filter(_operation, sites):
            surgeon.graft(site, SSFOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: SSFConfig) -> int:
        return math.prod(site.batch) * site.out_features * (2 if shifts(site) else 1)


def _operation(site: Site) -> bool:
    """Return True if the site is among the method's default targets."""
    if site.role in ("head", "router") or site.layer.one_hot:
        return False
    return len(site.weight_shape) > 1 or (site.role is not None and site.role.startswith("norm"))
