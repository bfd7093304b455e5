"""Prefix tuning.   Li and Liang 2021, arXiv 2101.00190 (code: XiangLi1999/PrefixTuning).

Equation:
    Attention(q, [P_k; K], [P_v; V])   in every layer;   P = W_l tanh(W Z + b) + b_l,   or P itself

P_k, P_v are `length` keys and values for each layer, in the same softmax as the keys and values of the attention. In
training a network generates them. All layers of a stack share Z [length, d] and (W, b), while each layer has its own
(W_l, b_l). With ``projection=None`` P trains directly. Encoder, decoder and cross-attention have separate prefixes. The
keys of a prefix have neither rotation nor relative bias. If the model uses positions, the positions of tokens start
after the prefix, as in the authors' code and in peft. With ``behind=False`` the positions of tokens are unchanged. With
grouped-query attention a prefix has as many heads as the keys; d is the width of all keys.

Parameters: length * 2 d a layer. With `projection`, (projection + 1) * 2 d a layer, and length d + (d + 1) projection
for each stack. A gate adds one a layer.

Start: A directly trained P starts from N(0, 1), the network as torch's layers. No start is an identity: a prefix gets a
share of the softmax even if its values are zero. With ``gate=True`` a layer computes its attention with and without the
prefix, at twice the cost, and mixes both by a scalar that starts at zero. With ``gate=True`` and ``behind=False`` the
start is an identity.

Differs from the authors' code: `gate` is an addition of peftcore. No other difference is known; outputs are compared
with peft.

Use it: `peftcore.apply(model, "prefix_tuning")`, for generation with frozen weights, with one prefix for each task or
user. It cannot be merged; rows of a batch may have different prefixes.
"""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt
from torch import nn

from peftcore.author import AttentionSite, LearningRate, Method, MethodConfig, Share, Site, Surgeon, Tags
from peftcore_additive._prefix import PrefixOperator, behind, prefix_count, shared_encoder


class PrefixTuningConfig(MethodConfig):
    """Options of prefix tuning."""

    method: Literal["prefix_tuning"] = "prefix_tuning"
    length: PositiveInt = 10
    """Number of trained keys and values in front of those of each attention. The paper uses 10 for table-to-text and
    200 for summaries."""
    projection: PositiveInt | None = 512
    """Width of the network that generates the prefix in training; None trains the prefix directly."""
    dropout: Share = 0.0
    """Dropout probability of the prefix's entries in training."""
    behind: bool = True
    """Start the positions of tokens after the prefix, as if its rows were words. The authors' code and peft do this
    too."""
    gate: bool = False
    """Mix the attention with and without the prefix by a trained scalar that starts at zero, so that a fresh injection
    does not change outputs. In models with positions this also needs ``behind=False``."""


class PrefixTuning(Method):
    """Trained keys and values in front of the keys and values of every attention."""

    name = "prefix_tuning"
    Config = PrefixTuningConfig
    tags = Tags(
        category="additive",
        paper="2101.00190",
        identity_at_init=False,
        identity_options={"gate": True, "behind": False},
    )
    learning_rate = LearningRate(5e-5, "XiangLi1999/PrefixTuning@6519d30, README.md", on="GPT-2 medium, WebNLG")
    target = ("attn.core", "cross.core")
    config_version = 2
    former_defaults = ({"behind": False},)

    def inject(self, model: nn.Module, config: PrefixTuningConfig, surgeon: Surgeon) -> None:
        def prefix(site: AttentionSite, own: PrefixTuningConfig) -> PrefixOperator:
            return PrefixOperator(site, own, shared_encoder(surgeon, site, own), own.gate)

        sites = surgeon.sites()
        for site in sites:
            surgeon.attention(site, prefix, config)
        if config.behind:
            behind(surgeon, sites, config)

    @staticmethod
    def parameter_count(site: Site, config: PrefixTuningConfig) -> int:
        return prefix_count(site, config, config.gate)
