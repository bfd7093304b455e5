"""Norm tuning: only gains and biases of normalization layers train.   arXiv 2312.11420 (LayerNorm tuning), 2211.08682.

Equation:
    y = g' * n(x) + c',   g' and c' trained, starting from g and c

All layers of the kinds LayerNorm, RMSNorm, GroupNorm and BatchNorm train, inside and outside of the blocks. The adapter
does not contain the running statistics of BatchNorm. The stored tensor itself trains, even if the layer transforms it
(Gemma's norms use 1 + g).

Parameters: 2 d per LayerNorm, d per RMSNorm.

Start: Trained tensors start at the model's values. A fresh adapter is the identity.

Differs from the authors' code: The code of the authors was not compared.

Use it: `peftcore.apply(model, "ln_tuning")`, for domain shift and multimodal alignment, where it is close to LoRA with
a hundredth of its parameters.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from peftcore.author import Method, MethodConfig, Site, Surgeon, Tags


class LNTuningConfig(MethodConfig):
    """Options of norm tuning: only those that every method has."""

    method: Literal["ln_tuning"] = "ln_tuning"


class LNTuning(Method):
    """Train the normalization layers."""

    name = "ln_tuning"
    Config = LNTuningConfig
    tags = Tags(category="selective", paper="2312.11420", mergeable=True)
    target = "norm.*"

    def inject(self, model: nn.Module, config: LNTuningConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.train(site.module_path)

    @staticmethod
    def parameter_count(site: Site, config: LNTuningConfig) -> int:
        return site.numel
