"""Prefix tuning.   Li and Liang 2021, arXiv 2101.00190 (code: XiangLi1999/PrefixTuning).

Equation:
    Attention(q, [P_k; K], [P_v; V])   in every layer;   P = W_l tanh(W Z + b) + b_l,   or P itself

P_k, P_v are `length` keys and values a layer, in the same softmax as the attention's own. While they train they are
made by a network: Z [length, d] and (W, b) are shared by the layers of a stack, (W_l, b_l) is the layer's slice of the
last matrix; with ``projection=None`` P trains directly. Encoder, decoder and cross-attention have separate prefixes.
Prefix keys carry no rotation and no relative bias. The positions of tokens start behind the prefix, as the authors and
peft have it, wherever the model takes positions; ``behind=False`` leaves them as they are. Under grouped-query
attention a prefix has the heads of the keys; d is their width.

Parameters: length * 2 d a layer; with projection (projection + 1) * 2 d a layer and (length d + (d + 1) projection) a
stack; with a gate one more a layer.

Start: P from N(0, 1) where it trains directly, else the network as torch's layers. No start is an identity: a prefix
takes mass in the softmax even where its values are zero. With ``gate=True`` the attention with prefix is mixed in by a
scalar a layer that starts at zero, at twice the cost: an identity, if ``behind=False`` too.

Differs from the authors' code: `gate` is ours; no difference is known (XiangLi1999/PrefixTuning); numbers are compared
with those of peft.

Use it: `peftcore.apply(model, "prefix_tuning")`, for generation with frozen weights, one prefix a task or a user:
nothing merges, and rows of a batch may have different ones.
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
    """Keys and values in front of each attention's own: 10 for tables to text, 200 for summaries in the paper."""
    projection: PositiveInt | None = 512
    """Width of the network that makes the prefix while it trains; None trains the prefix itself."""
    dropout: Share = 0.0
    """Probability with which numbers of the prefix are dropped in training."""
    behind: bool = True
    """Count the positions of tokens from behind the prefix, as if it were words, as the authors and peft do."""
    gate: bool = False
    """Mix the prefix in through a trained scalar that starts at zero, so that a fresh injection changes nothing; with
    ``behind=False`` also where positions count from the first token."""


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
