"""Custom diffusion: keys and values of cross-attention train.   Kumari et al. 2022, arXiv 2212.04488.

Equation:
    k = (W_k + delta_k) c,   v = (W_v + delta_v) c,   c the text,   delta = 0 at first

delta is a full matrix. As in the authors' code, the first token of the text (start of text) contributes no gradient to
delta. With `modifier_tokens`, the embeddings of the words that name the concept train too, as in `textual_inversion`.
This needs a model that contains its text encoder; if the text encoder is a separate model, apply `textual_inversion` to
it.

The method can be merged. For prior preservation, add images of the class to the training data.

Parameters: in * out a matrix; n * dim for the words.

Start: delta at zero: the identity, to the bit.

Differs from the authors' code: The authors' code (adobe-research/custom-diffusion) trains W + delta in place; here the
change is a separate parameter, so the base stays unchanged, and weight decay pulls the weights to the base instead of
to zero. The closed-form merge of several concepts and the compression of delta are not implemented. The authors' code
was not run; outputs are compared with diffusers.

Use it: `peftcore.apply(model, "custom_diffusion")`, to teach a few subjects at once, with lr 1e-5 and few steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor, nn

from peftcore.author import LearningRate, Method, MethodConfig, Operator, Site, Surgeon, Tags
from peftcore_diffusion import textual_inversion


class CustomDiffusionConfig(MethodConfig):
    """Options of custom diffusion."""

    method: Literal["custom_diffusion"] = "custom_diffusion"
    hold_first: bool = True
    """Exclude the keys and values of the text's first token from the gradient."""
    modifier_tokens: list[int] = Field(default_factory=list)
    """Ids of the words for the concepts, whose embeddings train too; negative ids count from the end of the table."""
    initializer: NonNegativeInt | None = None
    """Token id whose embedding all modifier tokens start from, usually that of a rare word. If None, they start from
    their current embeddings."""


class CustomDiffusionOperator(Operator):
    """The change of one matrix."""

    def __init__(self, site: Site, config: CustomDiffusionConfig) -> None:
        super().__init__(site)
        text = site.role in ("cross.k", "cross.v") and site.layer.channel_dim == -1
        self.hold_first = config.hold_first and text
        self.delta = nn.Parameter(torch.zeros(site.weight_shape))

    def forward(self, call: Callable[..., Tensor], c: Tensor) -> Tensor:
        y = call(c)
        (delta,) = self.cast(y, self.delta)
        change = self.layer.apply(c, delta)  # [batch, tokens, out]
        if self.hold_first:
            change = torch.cat([change[..., :1, :].detach(), change[..., 1:, :]], -2)
        return y + change

    def merged(self, weight: Tensor) -> Tensor:
        return weight + self.delta


class CustomDiffusion(Method):
    """Train the matrices of cross-attention that read the text."""

    name = "custom_diffusion"
    Config = CustomDiffusionConfig
    tags = Tags(category="diffusion", paper="2212.04488", mergeable=True)
    learning_rate = LearningRate(
        8e-5,
        "adobe-research/custom-diffusion@7c19c9a, README.md",
        on="Stable Diffusion 1.4, a cat; 1e-5 with --scale_lr",
    )
    target = ("cross.k", "cross.v")

    def inject(self, model: nn.Module, config: CustomDiffusionConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, CustomDiffusionOperator, config)
        if config.modifier_tokens:
            words = textual_inversion.TextualInversionConfig(
                tokens=config.modifier_tokens, initializer=config.initializer
            )
            surgeon.include("words", textual_inversion.TextualInversion(), words, "embed")

    @staticmethod
    def parameter_count(site: Site, config: CustomDiffusionConfig) -> int:
        if site.layer.one_hot and site.role not in ("cross.k", "cross.v"):
            return len(config.modifier_tokens) * site.out_features
        return site.numel
