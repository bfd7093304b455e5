"""AttentionFusion: each token's features are a learned mixture of its states in all layers.   Cao et al. 2022, Findings
of NAACL.

Equation:
    out = sum_l a_l W_v h_l,   a = softmax_l(q . W_k h_l / sqrt(d_k)),   W_k [d_k, d]  W_v [d, d]  q [d_k]

For one token, h_0 is the input of the first block and h_l the output of block l. The model's last norm and its head get
``out`` in place of h_L. With several heads, q, W_k h_l and W_v h_l are cut into one part for each head, and each head
has separate weights a. Without `project`, W_k and W_v are identities. No gradient reaches the backbone: its activations
are not stored for backward, and other adapters inside the blocks get no gradient.

Parameters: d_k + d d_k + d^2, or d without `project`.

Start: q starts at zero, so that all layers have equal weights, W_k like torch's linear layers, and W_v as an identity.
So the model predicts from the mean of its layers at the start, for which the head was not trained. No start is an
identity, and the head has to train too (`train=["classifier"]`, with your head's name).

Differs from the authors' code: The authors' code was not found, and the paper's text was not available. The equation
follows the abstract, and the remaining details are our choice.

Use it: `peftcore.apply(model, "attention_fusion")`, for classification with encoders, where many tasks share one
forward of the backbone (the states of its layers can be cached). If features have to change, use `lora`; if tokens need
further attention to each other, use the similar `lst`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from peftcore.author import BlockSite, Method, MethodConfig, Shared, Site, Surgeon, Tags, Tap, full_precision
from peftcore.errors import ConfigError
from peftcore_additive._side_networks import BesideOperator, beside


class AttentionFusionConfig(MethodConfig):
    """Options of attention fusion."""

    overridable = ()

    method: Literal["attention_fusion"] = "attention_fusion"
    key_width: PositiveInt = 64
    """Width d_k of the query and of the keys."""
    heads: PositiveInt = 1
    """Number of heads; it must divide d_k and the width of the stream."""
    project: bool = True
    """Project the states by W_k and W_v; False compares and averages the states themselves."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.project and self.key_width % self.heads:
            raise ValueError(f"key_width={self.key_width} is not divisible by heads={self.heads}")
        return self


class Fusion(nn.Module):
    """The trained query, and the linear maps of keys and values."""

    def __init__(self, width: int, config: AttentionFusionConfig) -> None:
        super().__init__()
        self.heads, keys = config.heads, config.key_width if config.project else width
        self.query = nn.Parameter(torch.zeros(keys))
        self.key = nn.Linear(width, keys, bias=False) if config.project else None
        self.value = nn.Linear(width, width, bias=False) if config.project else None
        if self.value is not None:
            nn.init.eye_(self.value.weight)

    def forward(self, states: Tensor) -> Tensor:
        """Map the states of layers ``[layers, ..., d]`` to ``[..., d]``."""
        query = self.query.unflatten(0, (self.heads, -1))  # [heads, d_k / heads]
        keys = states if self.key is None else self.key(states)
        values = states if self.value is None else self.value(states)
        scores = (keys.unflatten(-1, (self.heads, -1)) * query).sum(-1, keepdim=True) / math.sqrt(query.shape[-1])
        shares = scores.softmax(0)  # [layers, ..., heads, 1]
        return (shares * values.unflatten(-1, (self.heads, -1))).sum(0).flatten(-2)


class FusionOperator(BesideOperator):
    """Stores the state of a block; at the last block, returns the fusion of all states."""

    def __init__(self, site: BlockSite, taps: Sequence[Tap], fusion: Shared | None) -> None:
        super().__init__(site, taps, answers=fusion is not None)
        self.fusion = fusion

    def answer(self, states: list[Tensor], told: None) -> Tensor:
        assert self.fusion is not None, "it answers"
        module = self.fusion.module
        with full_precision(states[0]):
            fused: Tensor = module(torch.stack([state.to(module.query.dtype) for state in states]))
        return fused


class AttentionFusion(Method):
    """A trained query for the task, which attends to each token's states in all layers."""

    name = "attention_fusion"
    Config = AttentionFusionConfig
    tags = Tags(category="additive", paper="Findings of NAACL 2022", identity_at_init=False)
    target = ("block",)

    def inject(self, model: nn.Module, config: AttentionFusionConfig, surgeon: Surgeon) -> None:
        places = beside(surgeon)
        last = places[-1][0]
        if last.width % config.heads:
            raise ConfigError(
                f"the width {last.width} of the blocks of {type(model).__name__} is not divisible by "
                f"heads={config.heads}"
            )
        fusion = surgeon.own("fusion", lambda: Fusion(last.width, config))
        for site, taps in places:
            own = fusion if site is last else None
            surgeon.graft(site, FusionOperator, taps=taps, fusion=own)

    @staticmethod
    def parameter_count(site: Site, config: AttentionFusionConfig) -> int:
        return 0  # the query belongs to no site
