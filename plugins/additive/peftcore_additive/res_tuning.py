"""Res-Tuning's bypass: residual tuners in parallel with the model.   Jiang et al. 2023, arXiv 2310.19859 (code:
ms-swift).

Equation:
    z_l = R_l(b_l) + V_l(z_{l-1}),   z_0 = b_0,   R(x), V(x) = x + W_up gelu(W_down x + c) + e
    y   = z_L   in the place of b_L

b_0 is the input of the first block, b_l the output of block l. R_l and V_l ("lateral" and "vertical") are adapters of
inner width r with a residual connection. No gradient reaches the backbone, so its activations are not stored for
backward, and other adapters inside the blocks get no gradient. The model's last norm and head read y.

Parameters: 2 (2 d r + r + d) a block.

Start: Matrices start by Glorot's rule, biases from N(0, 1e-6^2); with `zero_last` the last block's W_up and e start at
zero. Since y is a sum of two residual streams, no start is an identity.

Differs from the authors' code: This follows the code (modelscope/ms-swift), which adds both terms of z_l, while the
paper weights them with a learned share. The code's other tuners (groups of channels, sampling between the sizes of a
UNet) are not implemented. The paper's form without a bypass puts adapters, prompts or prefixes in parallel with a
module, as `parallel_adapter` and `prefix_tuning` do.

Use it: `peftcore.apply(model, "res_tuning")`, where memory is limited. `lst` is an alternative of similar size with
attention in its side network. Res-Tuning processes each token separately, so it is simpler and does not need a cache.
It cannot be merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

from pydantic import PositiveInt
from torch import Tensor, nn

from peftcore.author import BlockSite, Method, MethodConfig, Shared, Site, Surgeon, Tags, Tap
from peftcore_additive._side_networks import BesideOperator, beside


class ResTuningConfig(MethodConfig):
    """Options of Res-Tuning's bypass."""

    overridable = ()

    method: Literal["res_tuning"] = "res_tuning"
    bottleneck: PositiveInt = 32
    """Width r of the tuners."""
    zero_last: bool = False
    """Start the last block's tuners as identities."""


class Tuner(nn.Module):
    """One residual tuner: it maps x to x + W_up gelu(W_down x + c) + e."""

    def __init__(self, width: int, bottleneck: int, zero: bool) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        for linear in (self.down, self.up):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=1e-6)
        if zero:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return states ``[..., d]`` plus the tuner's output."""
        y: Tensor = x + self.up(nn.functional.gelu(self.down(x)))
        return y


class Step(nn.Module):
    """The two tuners of the bypass at one block."""

    def __init__(self, width: int, bottleneck: int, zero: bool) -> None:
        super().__init__()
        self.lateral, self.vertical = Tuner(width, bottleneck, zero), Tuner(width, bottleneck, zero)

    def forward(self, z: Tensor, state: Tensor) -> Tensor:
        """Return the next state of the bypass, from its previous state and the block's output, both ``[..., d]``."""
        y: Tensor = self.lateral(state) + self.vertical(z)
        return y


class BypassOperator(BesideOperator):
    """Runs the bypass at one block; at the last block, returns the bypass's output."""

    def __init__(self, site: BlockSite, taps: Sequence[Tap], steps: Sequence[Shared]) -> None:
        super().__init__(site, taps, answers=bool(steps))
        self.steps = list(steps)

    def answer(self, states: list[Tensor], told: None) -> Tensor:
        dtype = self.steps[0].module.lateral.down.weight.dtype
        z, *read = (state.to(dtype) for state in states)
        for step, state in zip(self.steps, read, strict=True):
            z = step.module(z, state)
        return z


class ResTuning(Method):
    """A bypass network of residual tuners, which reads the outputs of blocks; its output replaces the last block's
    output."""

    name = "res_tuning"
    Config = ResTuningConfig
    tags = Tags(category="additive", paper="2310.19859", identity_at_init=False)
    target = ("block",)

    def inject(self, model: nn.Module, config: ResTuningConfig, surgeon: Surgeon) -> None:
        places = beside(surgeon)
        last, steps = places[-1][0], []
        for site, _ in places:
            sizes = (site.width, config.bottleneck, config.zero_last and site is last)
            steps.append(surgeon.own(site.path.replace(".", "_"), partial(Step, *sizes)))
        for site, taps in places:
            own = steps if site is last else []
            surgeon.graft(site, BypassOperator, taps=taps, steps=own)

    @staticmethod
    def parameter_count(site: Site, config: ResTuningConfig) -> int:
        return 0  # the bypass belongs to no site
