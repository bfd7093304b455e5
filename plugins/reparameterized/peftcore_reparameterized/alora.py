"""aLoRA: activated LoRA.   Greenewald et al. 2025, arXiv 2504.12397 (in peft by its authors).

Equation:
    y_t = W x_t + b + [t >= t_0] s B A dropout(x_t),   s = alpha / rank

t_0 is the position at which the invocation begins. The invocation is a fixed sequence of ids in the prompt before the
adapter's task, such as "<|start_of_role|>certainty" in a chat template. Tokens before it are computed by the base
model. So the adapter can continue from a cache of the base, or of any other aLoRA, without computing the prompt again.

As in peft, the last occurrence of the invocation in the input counts. ``generate`` searches it in the prompt, which may
be processed in chunks (``prefill_chunk_size=``). Its position is stored with the cache, which may be copied for each of
many adapters. If you pass a prompt to forward in parts, a part that would change the adapter of tokens in the cache
raises `SequenceError`. Rows without the invocation run the base model. ``peftcore.call(model, since=[...])`` passes t_0
of each row. Use it for inputs without ids, or if the base model already processed the invocation. `peftcore.route` with
``since=`` does the same for adapters of other methods. Without `invocation` the adapter acts on all tokens, unless
``since`` is passed. Only linear layers are adapted, as in peft.

Parameters: rank * (in + out) a site.

Start: A uniform in +-1/sqrt(in), B at zero: the identity.

Differs from the authors' code: In the code in peft, which is by the authors, the mask shifts with each generated token
if no cache is used. Here it does not.

Use it: `peftcore.apply(model, "alora", invocation=[5, 6])`, where one conversation uses many adapters, such as checks,
rewritings and judgements that share a long prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    MATRICES,
    LearningRate,
    Method,
    MethodConfig,
    Operator,
    Share,
    Site,
    Surgeon,
    Tags,
    forward_context,
)
from peftcore.errors import UnsupportedSite
from peftcore_reparameterized._low_rank import low_rank_count, low_rank_factors


class ALoRAConfig(MethodConfig):
    """Options of aLoRA."""

    method: Literal["alora"] = "alora"
    rank: PositiveInt = 32
    """Rank of the update."""
    alpha: PositiveFloat = 32.0
    """Numerator of the scale ``alpha / rank``."""
    scaling: Literal["rank", "sqrt_rank"] = "rank"
    """Denominator of the scale: the rank, or its square root (rsLoRA)."""
    dropout: Share = 0.0
    """Probability with which inputs of the update are dropped in training."""
    invocation: list[NonNegativeInt] = Field(default_factory=list)
    """The token ids of the invocation, from which on the adapter acts (`alora_invocation_tokens` in peft). If the list
    is empty, the adapter acts on all tokens."""


class ALoRAOperator(Operator):
    """The update of one linear layer. It acts on the invocation and on the tokens after it."""

    def __init__(self, site: Site, config: ALoRAConfig) -> None:
        super().__init__(site)
        if not (site.layer.called and site.layer.of_vectors and site.separable):
            raise UnsupportedSite(f"{site.path} does not act on each token independently; target linear layers")
        self.invocation = tuple(config.invocation)
        self.dropout = config.dropout
        self.scale = config.alpha / (config.rank if config.scaling == "rank" else math.sqrt(config.rank))
        self.A, self.B = low_rank_factors(site, config.rank)  # [rank, in], [out, rank]

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:  # x [batch, tokens, in]
        y = call(x)
        behind = forward_context().tokens_behind(self.invocation, x)  # [batch, tokens]; None: all
        if behind is None:
            return y + self.update(x, y)
        return y.index_put((behind,), self.update(x[behind], y), accumulate=True)

    def update(self, x: Tensor, y: Tensor) -> Tensor:
        """Return s B A dropout(x), for inputs ``[..., in]``, in the dtype of `y`."""
        A, B = self.cast(y, self.A, self.B)
        dropped = F.dropout(x, self.dropout) if self.training and self.dropout else x
        return self.layer.mix(self.scale * self.layer.apply(dropped, A), B)


class ALoRA(Method):
    """Low-rank adaptation of the tokens from an invocation on."""

    name = "alora"
    Config = ALoRAConfig
    tags = Tags(category="reparameterized", paper="2504.12397")
    learning_rate = LearningRate(
        6e-5, "IBM/activated-lora@736414e, train_scripts/basic_finetune_example.py", on="Granite 3.2 8B, an example"
    )
    reads_tokens = True
    target = ("attn.q", "attn.k", "attn.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: ALoRAConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, ALoRAOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: ALoRAConfig) -> int:
        return low_rank_count(site, config.rank)
