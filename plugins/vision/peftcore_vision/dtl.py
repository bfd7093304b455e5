"""DTL, disentangled transfer learning: a compact side network of low rank.   Fu et al. 2024, arXiv 2312.07856.

Equation:
    h_l = h_{l-1} + C_l A_l x_l,   h_{-1} = 0,   A_l [rank, d],   C_l [d, rank]
    x_{l+1} = L_l(x_l)                    for l < M
    x_{l+1} = L_l(x_l) + F(t(h_l))        for l >= M,   t(h) = h sigmoid(beta h)

x_l is the input of block l, from l = 0 on. The side network reads each block's input, and its sum is fed back only
after the blocks from M on: nothing trainable acts on the first M blocks, so backward stops at their end. F is the
identity; with `kernel` (DTL+) it is one depthwise convolution of that size, without a bias, which all blocks share. It
acts on the patches arranged as in the picture; tokens in front of the patches skip it. M is `start` times the number of
blocks, rounded down: 6 of 12 in the authors' scripts (heekhero/DTL).

Parameters: 2 rank d per block, and d kernel^2 with DTL+: 36,864 in ViT-B with rank 2.

Start: A starts as torch's linear layers do and C at zero, so a fresh adapter is an exact identity.

Differs from the authors' code: The authors also train a new head (``train=["head"]`` trains the model's head).

Use it: `peftcore.apply(model, "dtl")`, for image models where both memory and parameters are limited; not where all
blocks may change (`adaptformer`, `convpass`), nor where the blocks' states must not change at all (`lst`,
`res_tuning`). It cannot be merged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    BlockSite,
    LearningRate,
    Method,
    MethodConfig,
    Operator,
    Share,
    Shared,
    Site,
    Surgeon,
    Tags,
    Tap,
    TokenStacks,
    block_sites,
    on_first,
)
from peftcore.errors import UnsupportedSite
from peftcore_vision._patches import layout, patch_sites


class DTLConfig(MethodConfig):
    """Options of DTL."""

    overridable = ()

    method: Literal["dtl"] = "dtl"
    rank: PositiveInt = 2
    """Rank of a block's part of the side network."""
    start: Share = 0.5
    """The share of blocks, counted from the first, that get no feedback from the side network."""
    beta: PositiveFloat = 100.0
    """Steepness beta of t; the larger it is, the closer t is to a ReLU."""
    kernel: PositiveInt | None = None
    """Rows and columns of the convolution over the values that are fed back (DTL+); None leaves it out."""


class SideOperator(Operator):
    """The part of the side network at one block, and the feedback after the block. At the convolution that embeds the
    patches (form "patch") it records their grid."""

    def __init__(
        self,
        site: BlockSite,
        config: DTLConfig,
        before: Tap | None,
        behind: Tap,
        feeds: bool,
        kernel: Shared | None,
        lie: Tap,
    ) -> None:
        super().__init__(site)
        self.before, self.behind, self.feeds, self.kernel, self.lie = before, behind, feeds, kernel, lie
        self.beta = config.beta
        self.A = nn.Parameter(torch.empty(config.rank, site.width))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.C = nn.Parameter(torch.zeros(site.width, config.rank))

    def at(self, form: str, module: nn.Module) -> Callable[..., Any]:
        return self._at_patches if form == "patch" else self

    def _at_patches(self, call: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        patches = call(*args, **kwargs)  # [batch, features, rows, columns]
        self.lie.put((patches.shape[0], patches.shape[-2], patches.shape[-1]))
        return patches

    def forward(self, call: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        A, C = self.cast(x, self.A, self.C)
        h = F.linear(F.linear(x, A), C)
        if self.before is not None:
            h = self.before.get() + h
        self.behind.put(h)
        output = call(x, *args, **kwargs)
        return on_first(output, lambda y: y + self._fed(h).to(y.dtype)) if self.feeds else output

    def _fed(self, h: Tensor) -> Tensor:
        h = h * torch.sigmoid(self.beta * h)
        if self.kernel is None:
            return h
        (weight,) = self.cast(h, self.kernel.module.weight)
        if h.dim() == 4:  # [batch, rows, columns, d]
            return _convolved(h, weight)
        rows, columns = layout(self.lie.get(), h.shape[0], h.shape[1], None, None)
        others = h.shape[1] - rows * columns
        patches = _convolved(h[:, others:].unflatten(1, (rows, columns)), weight)
        return torch.cat([h[:, :others], patches.flatten(1, 2)], dim=1)


def _convolved(h: Tensor, weight: Tensor) -> Tensor:
    """Return [batch, rows, columns, d] with each channel convolved by itself."""
    size = weight.shape[-1]
    before, behind = (size - 1) // 2, size // 2
    padded = F.pad(h.movedim(-1, 1), (before, behind, before, behind))
    return F.conv2d(padded, weight, groups=len(weight)).movedim(1, -1)


class DTL(Method):
    """A side network of low rank, whose sum is fed back after the later blocks."""

    name = "dtl"
    Config = DTLConfig
    tags = Tags(category="vision", paper="2312.07856", reentrant=False)
    learning_rate = LearningRate(
        3e-4, "heekhero/DTL@bf6c51e, train_scripts/vit/vtab/cifar_100/train_dtl.sh", on="ViT-B/16, CIFAR-100 of VTAB"
    )
    target = ("block",)

    def inject(self, model: nn.Module, config: DTLConfig, surgeon: Surgeon) -> None:
        sites = TokenStacks(surgeon).answering(block_sites(surgeon), surgeon.wishes.target is not None)
        patches: tuple[Site, ...] = ()
        kernel: Shared | None = None
        if config.kernel is not None:
            d, k = sites[0].width, config.kernel
            patches = tuple(patch_sites(surgeon, sites[0]))
            if not patches:
                raise UnsupportedSite(f"{sites[0].path} does not process patches of a picture; remove kernel=")
            kernel = surgeon.own("fusion", lambda: nn.Conv2d(d, d, k, groups=d, bias=False))
        before, first, lie = None, int(len(sites) * config.start), Tap(until_backward=True)
        for number, site in enumerate(sites):
            behind, seen = Tap(until_backward=True, learns=True), () if number else patches
            sums = {"before": before, "behind": behind, "feeds": number >= first}
            surgeon.graft(site, SideOperator, config, seen, **sums, kernel=kernel, lie=lie)
            before = behind

    @staticmethod
    def parameter_count(site: Site, config: DTLConfig) -> int:
        return 2 * config.rank * site.out_features
