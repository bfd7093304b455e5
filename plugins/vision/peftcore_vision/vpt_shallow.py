"""VPT-shallow, visual prompt tuning.   Jia et al. 2022, arXiv 2203.12119 (code: KMnP/vpt).

Equation:
    [x_1; Z_1] = L_1([x_0; P]),   [x_l; Z_l] = L_l([x_{l-1}; Z_{l-1}]),   y = head(x_L),   P [length, d]

P is added to the tokens of an image (x: class token and patches) after they are embedded and have positions; P has no
positions. P passes through all blocks from the first target on, and its rows are removed after the last block, so
norms, poolers and heads read only the model's own tokens: in models that read the class token the result is the same as
the authors'. Between the blocks, hidden states contain the prompt after the model's tokens.

With `projection` P has that width, and one linear map projects it to d. The head trains too, as in the paper, starting
from the model's weights; heads that compare images with texts and diffusion models' outputs stay frozen.

Parameters: length * d; with projection length * projection and (projection + 1) * d for the map; and the head.

In diffusion transformers with a text input (SD3, Flux, PixArt) the prompt is a separate sequence parallel to the image
tokens, without positions. Its rows pass through the same blocks, with the same modulation as the image.

Start: P uniform in +-sqrt(6 / (3 p^2 + d)), where p is the side of a patch. No start is an identity: any added row
changes the outputs.

Differs from the authors' code: Where the authors average over tokens (their MAE models), they include the prompt's rows
in the mean unless VIT_POOL_TYPE is "img_pool"; here they are never counted. They keep dropout of the frozen blocks off
while prompts train: put the model in eval mode for that. They search learning rates from 0.05 to 50 with SGD.

Use it: `peftcore.apply(model, "vpt_shallow")`, for the smallest kind of visual prompt; vpt_deep is better on nearly all
tasks. Except in these diffusion transformers, attention must treat tokens as a set: relative and rotary positions,
windows and convolutions between tokens are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from peftcore.author import LearningRate, Method, Site, Surgeon, Tags, on_first
from peftcore_vision._prompt_streams import add_prompt_stream
from peftcore_vision._prompts import (
    PromptConfig,
    PromptOperator,
    prompt_count,
    prompt_sites,
    shared_projection,
    stack_ends,
    train_heads,
)

LEAVE = "prompt.leave"
"""The form of a site at the block after which the prompt's rows are removed."""


class VPTShallowConfig(PromptConfig):
    """Options of VPT-shallow."""

    method: Literal["vpt_shallow"] = "vpt_shallow"


class ShallowOperator(PromptOperator):
    """Adds the prompt in front of the first block, and removes its rows after the last block."""

    def at(self, form: str, module: nn.Module) -> Callable[..., Any]:
        return self._leave if form == LEAVE else self

    def forward(self, call: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
        rows = self.rows(x, (*args, *kwargs.values()))
        return call(torch.cat([x, rows], dim=1), *args, **kwargs)

    def _leave(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return on_first(call(*args, **kwargs), lambda y: y[:, : -self.length].contiguous())  # heads may want to view it


class VPTShallow(Method):
    """A trained prompt that passes through a vision transformer with the patches."""

    name = "vpt_shallow"
    Config = VPTShallowConfig
    tags = Tags(category="vision", paper="2203.12119", identity_at_init=False, per_row=False)
    learning_rate = LearningRate(
        0.1,
        "KMnP/vpt@4410440, configs/prompt/cub.yaml",
        on="ViT-B/16, CUB, batches of 128",
        optimizer="SGD",
        momentum=0.9,
    )
    target = ("block",)

    def inject(self, model: nn.Module, config: VPTShallowConfig, surgeon: Surgeon) -> None:
        sites = prompt_sites(surgeon)
        if add_prompt_stream(surgeon, sites, config, deep=False):
            return
        first, last = stack_ends(surgeon, sites)
        own = config.at(first.path)
        projection = shared_projection(surgeon, first, own)
        surgeon.graft(first, ShallowOperator, config, (replace(last, form=LEAVE),), projection=projection)
        if own.train_head:
            train_heads(surgeon, sites)

    @staticmethod
    def parameter_count(site: Site, config: VPTShallowConfig) -> int:
        return prompt_count(site, config)
