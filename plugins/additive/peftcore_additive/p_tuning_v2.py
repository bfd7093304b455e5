"""P-tuning v2, deep prompts for understanding.   Liu et al. 2021, arXiv 2110.07602 (code: THUDM/P-tuning-v2).

Equation:
    Attention(q, [P_k; K], [P_v; V])   in every layer;   P trained itself, or P = W_l tanh(W Z + b) + b_l

The equation is that of `prefix_tuning`; the paper applies it to understanding instead of generation. In the authors'
code, three points differ from prefix tuning. P trains directly, unless `projection` is set. Dropout acts on the prefix
in training. A new linear head for the classes of the task trains too, since labels are classes instead of words. The
method acts only on self-attention.

The keys of the prompts do not have positions. If the model uses positions, the positions of tokens start after the
prompts, as in the authors' code and in peft. With ``behind=False`` the positions of tokens are unchanged.

Parameters: length * 2 d a layer, where d is the width of its keys. With `projection`, (projection + 1) * 2 d a layer,
and length d + (d + 1) projection for each stack.

Start: P from N(0, 1); the network of `projection` as in `prefix_tuning`. No start is an identity.

Differs from the authors' code: No difference is known if the head trains too: name it in ``train=``, as in
``train=["classifier"]``. Outputs are compared with peft.

Use it: `peftcore.apply(model, "p_tuning_v2")`, for classification and tagging with a frozen encoder or decoder: easy
tasks need a length below 20, hard ones about 100. It cannot be merged; rows of a batch may have different prompts.
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
    """Dropout probability of the prompts' entries in training."""
    behind: bool = True
    """Start the positions of tokens after the prompts, as if the rows of the prompts were words. The authors' code and
    peft do this too."""


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
