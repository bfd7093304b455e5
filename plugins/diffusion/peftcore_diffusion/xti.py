"""Extended textual inversion: a separate word for each cross-attention.   Voynov et al. 2023, arXiv 2303.09522.

Equation:
    cross-attention l of L:   K = W_k c_l,  V = W_v c_l,   c_l = T(prompt with the tokens p_l)
    E'[tokens] = v,   v [n, dim] = E[tokens], or E[initializer], at the start;   n = L for each word

T is the frozen text encoder and E its token table. Only v trains, with the loss of the frozen UNet. A word has L tokens
p_1 to p_L, which follow each other in `tokens`. The prompt is encoded L times, the l-th time with p_l instead of the
word, and the UNet reads all L texts at once. P+ is the paper's name for the space of such texts.

    ids = tokenizer([prompt.replace("<toy>", f"<toy-{l}>") for prompt in prompts for l in range(L)], ...).input_ids
    unet(latents, t, encoder(ids)[0].unflatten(0, (-1, L)))          # states [batch, L, tokens, dim]

Apply the method to both models. In the text encoder it is `textual_inversion` with L tokens. In the UNet, with
``target="cross.k"``, nothing trains: each cross-attention reads its own states. States [batch, tokens, dim] are read by
all cross-attentions. If one model contains both, apply the method once, without a target. L is the number of
cross-attentions, counted from the input to the output: 16 in Stable Diffusion 1.5, 70 in SDXL.

Parameters: n * dim, in the text encoder.

Start: v starts as the embeddings of its tokens, or as the embedding of `initializer`. Outputs for texts without the new
words are unchanged.

Differs from the authors' code: The authors published no code. The order and shape of the states follow the code of
Mix-of-Show, which uses such words too.

Use it: `peftcore.apply(model, "xti")`, where `textual_inversion` has too few parameters for a subject, or where coarse
and fine layers need different texts. Where the UNet may change too, `ed_lora` and `custom_diffusion` learn subjects
better. The trained words can be merged, but the UNet's selection of separate texts cannot.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from peftcore.author import LearningRate, Method, Site, Surgeon, Tags
from peftcore.errors import UnsupportedSite
from peftcore_diffusion._layerwise import around, check_words, read_layers
from peftcore_diffusion.textual_inversion import TextualInversionOperator, WordsConfig, learn_words


class XTIConfig(WordsConfig):
    """Options of extended textual inversion."""

    method: Literal["xti"] = "xti"
    tokens: Annotated[list[int], Field(min_length=1)] = Field(default_factory=lambda: [*range(-16, 0)])
    """Ids of the placeholder tokens: first those of the first word, one for each cross-attention, then those of the
    next word. Negative ids count from the end of the table, where `resize_token_embeddings` adds new rows."""


class XTI(Method):
    """Train the embeddings of new words, one for each cross-attention.

    Example:
        injection = peftcore.apply(model, "xti", tokens=[5, 6, 7, 8])  # to a text encoder, or with its UNet
    """

    name = "xti"
    Config = XTIConfig
    tags = Tags(category="diffusion", paper="2303.09522", mergeable=True)
    learning_rate = LearningRate(5e-3, "mkshing/prompt-plus-pytorch@7862c3f, README.md", on="Stable Diffusion 1.4")
    target = ("embed",)

    def inject(self, model: nn.Module, config: XTIConfig, surgeon: Surgeon) -> None:
        sites = surgeon.sites()
        tables = [site for site in sites if site.layer.one_hot]
        keys = [site for site in sites if not site.layer.one_hot]
        layers, reading = read_layers(surgeon, keys if surgeon.wishes.target is not None else None)
        if strange := [site.path for site in keys if around(site) not in reading]:
            raise UnsupportedSite(
                f"{strange[0]} is neither a token table nor a cross.k of a UNet of diffusers; exclude it"
            )
        if tables and reading:
            check_words(config.tokens, layers)
        learn_words(surgeon, tables, TextualInversionOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: XTIConfig) -> int:
        return len(config.tokens) * site.out_features if site.layer.one_hot else 0
