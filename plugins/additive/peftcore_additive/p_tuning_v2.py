"""P-tuning v2, deep prompts for understanding.   Liu et al. 2021, arXiv 2110.07602 (code: THUDM/P-tuning-v2).

Equation:
    Attention(q, [P_k; K], [P_v; V])   in every layer;   P trained itself, or P = W_l tanh(W Z + b) + b_l

The equation is prefix tuning's, carried over from generation to understanding. In the authors' code three things differ
from it: P trains directly, unless `projection` asks for the network; numbers of the prefix are dropped in training; and
a fresh linear head for the classes of the task trains along (labels are classes, not words). It acts on self-attention
only.

The prompts' keys carry no position. The positions of tokens start behind the prompts, as the authors and peft have it,
wherever the model takes positions; ``behind=False`` leaves them as they are.

Parameters: length * 2 d a layer (d: the width of its keys); with projection (projection + 1) * 2 d a layer and (length
d + (d + 1) projection) a stack.

Start: P from N(0, 1); the network of `projection` as in `prefix_tuning`. No start is an identity.

Differs from the authors' code: No difference is known where the head is trained; numbers are compared with those of
peft. Name the head in ``train=``, as in ``train=["classifier"]``.

Use it: `peftcore.apply(model, "p_tuning_v2")`, for classification and tagging with a frozen encoder or decoder: easy
tasks want a length below 20, hard ones about 100. Nothing merges; rows of a batch may have different prompts.
"""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt
from torch import nn

from peftcore.author import AttentionSite, LearningRate, Method, MethodConfig, Share, Site, Surgeon, Tags
from peftcore_additive._prefix import PrefixOperator, behind, prefix_count, shared_encoder


class PTuningV2Config(MethodConfig):
    """Options of P-tuning v2."""

    method: Literal["p_tuning_v2"] = "p_tuning_v2"
    length: PositiveInt = 20
    """Deep prompts a layer; the authors search from 4 to 160 by task."""
    projection: PositiveInt | None = None
    """Width of the network that makes the prompts while they train (512 in the authors' code); None trains them
    themselves."""
    dropout: Share = 0.1
    """Probability with which numbers of the prompts are dropped in training."""
    behind: bool = True
    """Count the positions of tokens from behind the prompts, as if these were words, as the authors and peft do."""


class PTuningV2(Method):
    """Trained keys and values in front of the keys and values of every self-attention, made for tasks of
    understanding."""

    name = "p_tuning_v2"
    Config = PTuningV2Config
    tags = Tags(category="additive", paper="2110.07602", identity_at_init=False, random=True)
    learning_rate = LearningRate(
        5e-3, "THUDM/P-tuning-v2@b1520c9, run_script/run_boolq_bert.sh", on="BERT-large, BoolQ"
    )
    target = ("attn.core",)
    config_version = 2
    former_defaults = ({"behind": False},)

    def inject(self, model: nn.Module, config: PTuningV2Config, surgeon: Surgeon) -> None:
        def prompts(site: AttentionSite, own: PTuningV2Config) -> PrefixOperator:
            return PrefixOperator(site, own, shared_encoder(surgeon, site, own))

        sites = surgeon.sites()
        for site in sites:
            surgeon.attention(site, prompts, config)
        if config.behind:
            behind(surgeon, sites, config)

    @staticmethod
    def parameter_count(site: Site, config: PTuningV2Config) -> int:
        return prefix_count(site, config)
