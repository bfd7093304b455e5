"""Extended textual inversion: a separate word for each cross-attention.   Voynov et al. 2023, arXiv 2303.09522.

Equation:
    cross-attention l of L:   K = W_k c_l,  V = W_v c_l,   c_l = T(prompt with the tokens p_l)
    E'[tokens] = v,   v [n, dim] = E[tokens], or E[initializer], at the start;   n = L for each word

T is the frozen text encoder, E its table, and only v trains, with the loss of the frozen UNet: P+ is the space of such
texts, one for each cross-attention. A word is L tokens, p_1 to p_L, one after the other in `tokens`: the prompt is
encoded L times, with p_l instead of the word, and the UNet reads all states at once,

    ids = tokenizer([prompt.replace("<toy>", f"<toy-{l}>") for prompt in prompts for l in range(L)], ...).input_ids
    unet(latents, t, encoder(ids)[0].unflatten(0, (-1, L)))          # states [batch, L, tokens, dim]

so the method is applied to both models: to the text encoder, where it is `textual_inversion` with L tokens; and with
target="cross.k" to the UNet, where nothing trains: each cross-attention reads its own states, and states [batch,
tokens, dim] are used by all cross-attentions. A model that contains both needs one adapter, without a target. L counts
the cross-attentions from the input to the output: 16 in Stable Diffusion 1.5, 70 in SDXL.

Parameters: n * dim, in the text encoder.

Start: v at the embeddings of its tokens, or of `initializer`: the identity for other words.

Differs from the authors' code: The authors published no code; order and shape of the states follow Mix-of-Show, which
has the same words.

Use it: `peftcore.apply(model, "xti")`, where `textual_inversion` has too few parameters for a subject, or coarse layers
have to show something else than fine ones; not where the UNet may change too (`ed_lora` and `custom_diffusion` are
better at subjects). The words merge; the UNet's reading of separate texts does not.
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
        injection = peftcore.apply(model, "xti", tokens=[5, 6, 7, 8])  # of a text encoder; and of its UNet
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
