"""P-tuning v2, deep prompts for understanding.   Liu et al. 2021, arXiv 2110.07602 (code: THUDM/P-tuning-v2).

Equation:
    Attention(q, [P_k; K], [P_v; V])   in every layer;   P trained itself, or P = W_l tanh(W Z + b) + b_l

The equation is that of `prefix_tuning`; the paper applies it to understanding instead of generation. Three points
differ from prefix tuning in the authors' code: P trains directly, unless `projection` asks for the network; numbers of
the prefix are dropped in training; and a new linear head for the classes of the task trains too (labels are classes,
not words). The method acts only on self-attention.

The prompts' keys have no positions. If the model uses positions, those of tokens start after the prompts, as in the
authors' code and in peft; ``behind=False`` does not move them.

Parameters: length * 2 d a layer (d: the width of its keys); with projection (projection + 1) * 2 d a layer and (length
d + (d + 1) projection) a stack.

Start: P from N(0, 1); the network of `projection` as in `prefix_tuning`. No start is an identity.

Differs from the authors' code: No difference is known if the head trains too: name it in ``train=``, as in
``train=["classifier"]``. Outputs are compared with peft.

Use it: `peftcore.apply(model, "p_tuning_v2")`, for classification and tagging with a frozen encoder or decoder: easy
tasks need a length below 20, hard ones about 100. Nothing merges; rows of a batch may have different prompts.
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
    """Number of prompt rows in each layer; the authors search from 4 to 160 by task."""
    projection: PositiveInt | None = None
    """Width of the network that generates the prompts in training (512 in the authors' code); None trains the prompts
    directly."""
    dropout: Share = 0.1
    """Probability with which numbers of the prompts are dropped in training."""
    behind: bool = True
    """Start the positions of tokens after the prompts, as if their rows were words, as the authors and peft do."""


class PTuningV2(Method):
    """Trained keys and values in front of the keys and values of every self-attention, for classification and
    tagging."""

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
