"""VPT-deep, visual prompt tuning.   Jia et al. 2022, arXiv 2203.12119 (code: KMnP/vpt).

Equation:
    [x_l; ...] = L_l([x_{l-1}; P_l])   at each block l,   y = head(x_L),   P_l [length, d]

Each block has a separate prompt. The block's output for its prompt is removed; the authors' code overwrites it before
the next block. So between blocks the model's hidden states keep their shape, and after the last block norms, poolers
and heads read only the model's own tokens: in models that read the class token the result is the same as the authors'.
Blocks that are not targets run without a prompt (FORWARD_DEEP_NOEXPAND in the authors' ablations).

With `projection` prompts have that width, and one linear map projects all of them to d. The head trains too, as in the
paper, starting from the model's weights; heads that compare images with texts and diffusion models' outputs stay
frozen.

Parameters: length * d per block; with projection length * projection per block, and (projection + 1) * d for the map;
and the head.

In diffusion transformers with a text input (SD3, Flux, PixArt) the prompts are a separate sequence parallel to the
image tokens, without positions. Each block has a separate prompt, which is modulated like the image.

Start: P uniform in +-sqrt(6 / (3 p^2 + d)), where p is the side of a patch. No start is an identity.

Differs from the authors' code: Where the authors average over tokens (their MAE models), they include the last prompt's
rows in the mean unless VIT_POOL_TYPE is "img_pool"; here they are never counted. They keep dropout of the frozen blocks
off while prompts train: put the model in eval mode for that. They search learning rates from 0.05 to 50 with SGD.

Use it: `peftcore.apply(model, "vpt_deep")`, on vision transformers with few images a class. Except in these diffusion
transformers, attention must treat tokens as a set: relative and rotary positions, windows and convolutions between
tokens are refused.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from peftcore.author import LearningRate, Method, Site, StreamSite, Surgeon, Tags
from peftcore_vision._prompt_streams import add_prompt_stream
from peftcore_vision._prompts import (
    DeepOperator,
    PromptConfig,
    prompt_count,
    prompt_sites,
    shared_projection,
    train_heads,
)


class VPTDeepConfig(PromptConfig):
    """Options of VPT-deep."""

    method: Literal["vpt_deep"] = "vpt_deep"


class VPTDeep(Method):
    """Trained prompts, separate ones at each block of a vision transformer."""

    name = "vpt_deep"
    Config = VPTDeepConfig
    tags = Tags(category="vision", paper="2203.12119", identity_at_init=False, per_row=False)
    learning_rate = LearningRate(
        0.25, "KMnP/vpt@4410440, demo.ipynb", on="ViT-B/16, dmlab of VTAB, batches of 64", optimizer="SGD", momentum=0.9
    )
    target = ("block",)

    def inject(self, model: nn.Module, config: VPTDeepConfig, surgeon: Surgeon) -> None:
        sites = prompt_sites(surgeon)
        if add_prompt_stream(surgeon, sites, config, deep=True):
            return
        for site in sites:
            projection = shared_projection(surgeon, site, config.at(site.path))
            surgeon.graft(site, DeepOperator, config, projection=projection)
        if config.train_head:
            train_heads(surgeon, sites)

    @staticmethod
    def parameter_count(site: Site, config: VPTDeepConfig) -> int:
        prompts = len(site.blocks) if isinstance(site, StreamSite) else 1
        return prompts * prompt_count(site, config)
