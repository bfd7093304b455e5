"""VPT-shallow, visual prompt tuning.   Jia et al. 2022, arXiv 2203.12119 (code: KMnP/vpt).

Equation:
    [x_1; Z_1] = L_1([x_0; P]),   [x_l; Z_l] = L_l([x_{l-1}; Z_{l-1}]),   y = head(x_L),   P [length, d]

P joins the tokens of an image (class token x and patches alike) once they are embedded and have their positions; P is
without positions. It passes through all blocks (from the first one that `target` has), and its rows are dropped behind
the last one, so that norms, poolers and heads see the model's own tokens alone: for models that read the class token
this is the authors' model. Between the blocks, hidden states carry the prompt behind the model's tokens.

With `projection` P has that width, and one linear map projects it to d. The head trains along, as in the paper, from
where the model's is; not where images meet texts, nor in diffusion.

Parameters: length * d; with projection length * projection and (projection + 1) * d for the map; and the head.

In diffusion transformers with a text input (SD3, Flux, PixArt) the prompt is a stream parallel to the image, without
positions: its rows go through the same blocks, modulated as the image is.

Start: P uniform in +-sqrt(6 / (3 p^2 + d)), p the side of a patch. No start is an identity: any added row changes the
outputs.

Differs from the authors' code: Where the authors average over tokens (their MAE models), they count the prompt's rows
in unless VIT_POOL_TYPE is "img_pool"; here they are never counted. They keep dropout of the frozen blocks off while
prompts train: put the model in eval mode for that. They search learning rates from 0.05 to 50 with SGD.

Use it: `peftcore.apply(model, "vpt_shallow")`, as the smallest of visual prompts; vpt_deep is better on nearly all
tasks. It needs tokens that are a set: elsewhere, relative and rotary positions, windows and convolutions between tokens
are refused.
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
"""The form of the block behind which the rows are dropped."""


class VPTShallowConfig(PromptConfig):
    """Options of VPT-shallow."""

    method: Literal["vpt_shallow"] = "vpt_shallow"


class ShallowOperator(PromptOperator):
    """Adds the prompt at the first block, and drops it behind the last one."""

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
