"""ED-LoRA: a subject as two layer-wise words, plus LoRA.   Gu et al. 2023 (Mix-of-Show), arXiv 2305.18292.

Equation:
    y = W x + b + alpha B A x,   A [rank, in], B [out, rank],   in the attentions of text encoder and UNet
    cross-attention l of L:   K = W_k c_l,  V = W_v c_l,   c_l = T(prompt with V_rand_l V_class_l)
    V_rand = random_std N(0, 1),   V_class = E[initializer],   each the same vector for all l at first

The prompt names the subject by two words: an unused word, and a word for its class. Each word has L tokens, one for
each cross-attention. The words learn most of the subject's looks and the LoRA learns less, so that several subjects can
be fused (`mix_of_show`). The scale is alpha itself, independent of the rank.

Add the tokens of both words to the tokenizer, then apply the method to the text encoder with `random_tokens` and
`class_tokens`, and to the UNet without them. If one model contains both, apply the method once, with the tokens, and
set `target` to the roles in both parts that LoRA adapts. As with `xti`, the UNet reads states of a text for each
cross-attention, [batch, L, tokens, dim], or common states [batch, tokens, dim]. A merged UNet accepts only common
states; ``peftcore.apply(unet, "xti", target="cross.k")`` makes it accept states for each cross-attention again.

Parameters: rank * (in + out) a matrix; n * dim for the words, n ids.

Start: A ~ U(-1, 1) / sqrt(in), B at zero, the words as in the equation. Texts without these two words have unchanged
outputs.

Differs from the authors' code: The authors use a learning rate of 1e-5 for the text encoder and 1e-4 for the UNet. They
stop training the words when their mean norm reaches 0.55, and mask the loss and the attention maps by the subject. Your
training loop has to do both; ``vectors.requires_grad_(False)`` stops training the words.

Use it: `peftcore.apply(model, "ed_lora")`, for subjects that will be combined in one picture later; not for a single
one (`lora` and `textual_inversion` need only one text for all layers), nor where the model must not change (`xti`). It
can be merged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import AppliedMethod, LearningRate, Method, MethodConfig, Operator, Site, Surgeon, Tags
from peftcore.errors import UnsupportedSite
from peftcore_diffusion._layerwise import check_words, read_layers
from peftcore_diffusion.textual_inversion import TextualInversionOperator, WordsConfig, learn_words


class EDLoRAConfig(MethodConfig):
    """Options of ED-LoRA."""

    method: Literal["ed_lora"] = "ed_lora"
    rank: PositiveInt = 4
    """Rank of the updates."""
    alpha: PositiveFloat = 1.0
    """Scale of the updates, which is not divided by the rank."""
    random_tokens: list[int] = Field(default_factory=list)
    """Token ids of the unused word V_rand, one for each cross-attention. Negative ids count from the end of the
    table."""
    class_tokens: list[int] = Field(default_factory=list)
    """Token ids of the class's word V_class, one for each cross-attention."""
    random_std: NonNegativeFloat = 0.013
    """Standard deviation of the vector from which V_rand starts."""
    initializer: NonNegativeInt | None = None
    """Token id whose embedding V_class starts from, that of the class's name. If None, V_class starts from the current
    embeddings of `class_tokens`."""
    word_lr: PositiveFloat = 1e-3
    """Learning rate of the words. The LoRA uses the learning rate of the optimizer."""


class EDLoRAOperator(Operator):
    """The update of one matrix."""

    stackable = factors_are_parameters = True
    padded, scaled = frozenset({"A", "B"}), frozenset({"B"})

    def __init__(self, site: Site, config: EDLoRAConfig) -> None:
        """Make the factors.

        Raises:
            UnsupportedSite: the site is a table of tokens.
        """
        super().__init__(site)
        if site.layer.one_hot:
            raise UnsupportedSite(
                f"{site.path} is a token table, which random_tokens= and class_tokens= adapt; exclude it from target="
            )
        self.scale, inputs = config.alpha, site.in_features * math.prod(site.kernel)
        A = torch.empty(*site.batch, config.rank, site.in_features, *site.kernel)
        self.A = nn.Parameter(A.uniform_(-1, 1) / math.sqrt(inputs))
        self.B = nn.Parameter(torch.zeros(*site.batch, site.out_features, config.rank))

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.A, self.B, self.scale

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        return self.layer.update(call, x, *self.factors())

    def merged(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.B @ self.A.flatten(self.B.dim() - 1)).view(weight.shape)


class SubjectOperator(TextualInversionOperator):
    """Trains the embeddings of both words: first the vectors of V_rand, then the vectors of V_class."""

    def __init__(self, site: Site, config: EDLoRAConfig) -> None:
        tokens, random = [*config.random_tokens, *config.class_tokens], len(config.random_tokens)
        super().__init__(site, WordsConfig(method="ed_lora", tokens=tokens, initializer=config.initializer))
        with torch.no_grad():
            self.vectors[:random] = config.random_std * torch.randn(site.out_features)


class EDLoRA(Method):
    """Layer-wise words for a subject, and low-rank adaptation of text encoder and UNet.

    Example:
        injection = peftcore.apply(model, "ed_lora", random_tokens=[5, 6, 7, 8], class_tokens=[9, 10, 11, 12])
    """

    name = "ed_lora"
    Config = EDLoRAConfig
    tags = Tags(category="diffusion", paper="2305.18292", mergeable=True, low_rank=True)
    learning_rate = LearningRate(
        1e-4,
        "TencentARC/Mix-of-Show@51270fd, options/train/EDLoRA/real/8101_EDLoRA_potter_Cmix_B4_Repeat500.yml",
        on="the UNet of Stable Diffusion 1.5; 1e-5 for the text encoder",
    )
    target = ("attn.q", "attn.k", "attn.v", "attn.out", "cross.q", "cross.k", "cross.v", "cross.out")

    def inject(self, model: nn.Module, config: EDLoRAConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, EDLoRAOperator, config)
        layers, _ = read_layers(surgeon, left_out=True)
        for tokens in filter(None, (config.random_tokens, config.class_tokens)):
            check_words(tokens, layers)
        if config.random_tokens or config.class_tokens:
            learn_words(surgeon, surgeon.sites("embed"), SubjectOperator, config)

    def parameter_groups(self, injection: AppliedMethod, *, lr: float, **defaults: Any) -> list[dict[str, Any]]:
        groups: dict[float, list[nn.Parameter]] = {}
        for graft in injection.grafts:
            words = isinstance(graft.operator, SubjectOperator)
            rate = injection.config.at(graft.site.path).word_lr if words else lr
            groups.setdefault(rate, []).extend(p for p in graft.operator.parameters() if p.requires_grad)
        return [{"params": params, **defaults, "lr": rate} for rate, params in groups.items() if params]

    @staticmethod
    def parameter_count(site: Site, config: EDLoRAConfig) -> int:
        if site.layer.one_hot:
            return (len(config.random_tokens) + len(config.class_tokens)) * site.out_features
        if not site.layer.has(site.module, site.tensor):  # an attention, which reads its own text
            return 0
        inputs = site.in_features * math.prod(site.kernel)
        return math.prod(site.batch) * config.rank * (inputs + site.out_features)
