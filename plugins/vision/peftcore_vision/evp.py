"""EVP: explicit visual prompting.   Liu et al. 2023, arXiv 2303.10883 (code: NiFangBaAGe/Explicit-Visual-Prompt).

Equation:
    x_i' = x_i + U gelu(T_i (F_hfc + F_pe) + t_i) + u        in front of block i, at the patches
    F_pe = L e,   F_hfc = N(K * h),   h = |IFFT(mask FFT(picture))|

e [patches, d] is the frozen model's embedding of patches, without positions. h is the picture without its low
frequencies: those in a rectangle around 0 with the share τ of all are dropped. K is a convolution like the model's own
over patches, with c = d / reduction channels, N a norm where the model has one behind its own (SegFormer, not ViT). T_i
[c, c] is a block's own, U [d, c], L [c, d] and K one of each stage: in the later stages of a pyramid K reads the F_hfc
of the stage before. All is computed in float32 where the model is in half precision, whose FFT is less than that.

The class token and its like, in front of the patches, get nothing, as in their code of ViTs, where `reduction` is 32.

Parameters of a stage with l blocks, n channels before it and kernels of k by k: c (n k^2 + 1) + c (d + 1) + d (c + 1) +
l c (c + 1), and 2 c with a norm.

Start: Matrices from N(0, 0.02^2), truncated, K from N(0, 2 / (k^2 c)), biases at zero. A fresh prompt is not an
identity (`zero_up` makes it one).

Differs from the authors' code: the authors train the decoder of masks along (``train=["decode_head"]``).

Use it: `peftcore.apply(model, "evp")`, for tasks that depend on low-level structure (forgery, shadows, blur,
camouflage); not where it does not matter, nor in models of text. It depends on the input and cannot be merged.
`vpt_deep` is its kin with prompts that know no picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftcore.author import BlockSite, LearningRate, Method, Operator, Shared, Site, Surgeon, Tags, Tap, block_sites
from peftcore.errors import ConfigError, UnsupportedSite
from peftcore_vision._explicit import ExplicitConfig, StageOperator, channels, starting
from peftcore_vision._stages import StageSite, stages_of


class EVPConfig(ExplicitConfig):
    """Options of EVP."""

    overridable = ()

    method: Literal["evp"] = "evp"
    zero_up: bool = False
    """Start U at zero: an exact identity."""


class EVPOperator(Operator):
    """The prompts in front of one block."""

    changes_inputs, only_inputs = True, True

    def __init__(self, site: BlockSite, config: EVPConfig, feature: Tap, up: Shared) -> None:
        super().__init__(site)
        c = site.width // config.reduction
        self.tune, self.feature, self.up = starting(nn.Linear(c, c)), feature, up

    def forward(self, call: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Act in front of the block; raises UnsupportedSite where it is not given the patches of its stage."""
        feature = self.feature.get()
        tokens = x.flatten(1, -2)  # [batch, tokens, d]
        if feature is None or feature.shape[1] > tokens.shape[1]:
            raise UnsupportedSite("this block is not given the patches that the convolution of its stage embedded")
        prompts = self.up.module(nn.functional.gelu(self.tune(feature))).to(x.dtype)
        others = tokens.shape[1] - feature.shape[1]
        tokens = torch.cat([tokens[:, :others], tokens[:, others:] + prompts], 1)
        return call(tokens.view(x.shape), *args, **kwargs)


def _up(c: int, d: int, zero: bool) -> nn.Linear:
    return starting(nn.Linear(c, d), zero)


class EVP(Method):
    """Prompts of a picture's high frequencies and patches."""

    name = "evp"
    Config = EVPConfig
    tags = Tags(
        category="vision",
        paper="2303.10883",
        identity_at_init=False,
        identity_options={"zero_up": True},
        reentrant=False,
    )
    learning_rate = LearningRate(
        2e-4,
        "NiFangBaAGe/Explicit-Visual-Prompt@601ae99, configs/train/segformer/train_segformer_evp_cod.yaml",
        on="SegFormer-B4, camouflaged objects",
    )
    target = ("block",)

    def inject(self, model: nn.Module, config: EVPConfig, surgeon: Surgeon) -> None:
        if config.frequencies == "none" and not config.patches:
            raise ConfigError("prompts are made of frequencies or patches: take frequencies= or patches=True")
        stages = stages_of(surgeon, block_sites(surgeon))
        taps = [(Tap(until_backward=True, learns=True), Tap(until_backward=True, learns=True)) for _ in stages]
        for number, stage in enumerate(stages):
            d = stage.site.out_features
            if d < config.reduction:
                raise UnsupportedSite(f"{stage.site.path} has {d} features, less than reduction={config.reduction}")
            c = d // config.reduction
            surgeon.graft(stage.site, StageOperator, config, stage.norm, taps=taps)
            if stage.blocks:
                up = surgeon.own(f"up_{number}", partial(_up, c, d, config.zero_up))
            for site in stage.blocks:
                surgeon.graft(site, EVPOperator, config, feature=taps[number][1], up=up)

    @staticmethod
    def parameter_count(site: Site, config: EVPConfig) -> int:
        c = site.out_features // config.reduction
        if not isinstance(site, StageSite):
            return c * (c + 1)
        seen = math.prod(site.kernel) * channels(site, config) + 1 + 2 * site.normed
        return c * (seen * (config.frequencies != "none") + (site.out_features + 1) * config.patches)
