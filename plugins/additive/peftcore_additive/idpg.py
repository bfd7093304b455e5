"""IDPG: a prompt that is made for each text.   Wu et al. 2022, arXiv 2204.04497 (code: CSerxy/IDPG).

Equation:
    X' = [P(x) ; X],   P(x) = W2 gelu(W1 u + b1) + b2,   u what the model itself makes of the text x

X are the embedded tokens. A first pass without the prompt, of which no gradients are kept, gives u [d]: the state of
the text's first token, or of its last one in causal models; W1 [h, d] and W2 [length d, h] make the rows of P from it.
With `phm` (IDPG-PHM) both are sums of Kronecker products, W = (sum_i S_i x V_i)^T, i = 1..n, with S_i [n, n] and V_i an
n-th of the matrix each way. In training u and the hidden layer are dropped out.

The text is all tokens before the first label, or the whole input, unless ``peftcore.call(model, prompt_length=...)``
says it: the prompt is made once, and generated tokens do not change it.

Parameters: (d + 1) h + (h + 1) length d; with `phm` 2 n^3 + (d h + h length d) / n + h + length d.

Start: W1, W2 start N(0, 0.02) and b at zero; with `phm` all factors and b1 start N(0, 0.05), b2 uniform in +-0.5. No
start is an identity.

Differs from the authors' code: Only the single-layer IDPG of the paper is here; its multi-layer one adds another prompt
to the same rows at each layer. The authors put the rows behind the first token, [CLS]; here they are in front of it,
like all prompts.

Use it: `peftcore.apply(model, "idpg")`, where texts of a task need different prompts; not where the time of a second
pass counts (smop chooses a prompt by the embeddings alone).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    InstanceOperator,
    LearningRate,
    Method,
    MethodConfig,
    SequenceSite,
    Share,
    Site,
    Surgeon,
    Tags,
    Tap,
    full_precision,
)
from peftcore.errors import UnsupportedSite
from peftcore_additive._first_pass import first_pass


class IDPGConfig(MethodConfig):
    """Options of IDPG."""

    method: Literal["idpg"] = "idpg"
    length: PositiveInt = 5
    """Rows of the prompt."""
    hidden: PositiveInt = 16
    """Width h of the network that makes it."""
    phm: PositiveInt | None = 16
    """How many Kronecker products a matrix of the network is the sum of; it divides the width and h. None trains the
    matrices themselves (IDPG-DNN)."""
    dropout: Share = 0.1
    """Dropout in front of either matrix, in training."""


class KroneckerSum(nn.Module):
    """A linear layer whose matrix is a sum of n Kronecker products."""

    def __init__(self, inputs: int, outputs: int, n: int, bias: Tensor) -> None:
        super().__init__()
        self.rules = nn.Parameter(torch.randn(n, n, n) * 0.05)
        self.factors = nn.Parameter(torch.randn(n, inputs // n, outputs // n) * 0.05)
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[batch, outputs]`` for x ``[batch, inputs]``."""
        parts = x.unflatten(-1, (self.rules.shape[1], -1))  # [batch, n, inputs / n]
        y = torch.einsum("bpr,ipq,irs->bqs", parts, self.rules, self.factors)
        return y.flatten(-2) + self.bias


class IDPGOperator(InstanceOperator):
    """The network that makes the prompt of one stack."""

    def __init__(self, site: SequenceSite, config: IDPGConfig) -> None:
        super().__init__(site, config.length)
        width, hidden, outputs, n = self.width, config.hidden, config.length * self.width, config.phm
        self.dropout, self.summary = nn.Dropout(config.dropout), Tap()
        self.down: nn.Module
        self.up: nn.Module
        if n is None:
            self.down, self.up = nn.Linear(width, hidden), nn.Linear(hidden, outputs)
            for layer in (self.down, self.up):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
            return
        if width % n or hidden % n:
            raise UnsupportedSite(
                f"phm={n} does not divide both the width {width} of {site.path} and hidden={hidden}; set a phm that "
                "does, or phm=None"
            )
        self.down = KroneckerSum(width, hidden, n, torch.randn(hidden) * 0.05)
        self.up = KroneckerSum(hidden, outputs, n, torch.rand(outputs) - 0.5)

    def look(self, call: Callable[..., Any], given: Mapping[str, Any], text: Tensor) -> None:
        self.summary.put(first_pass(self, call, given, text).state)

    def rows_of(self, embeds: Tensor, text: Tensor) -> Tensor:
        summary = self.summary.take()
        with full_precision(embeds):
            hidden = self.down(self.dropout(summary.to(self.down.bias.dtype)))
            made: Tensor = self.up(self.dropout(nn.functional.gelu(hidden)))
        return made.unflatten(-1, (self.length, self.width))


class IDPG(Method):
    """A prompt for each text, generated from the model's own state of the text."""

    name = "idpg"
    Config = IDPGConfig
    tags = Tags(category="additive", paper="2204.04497", identity_at_init=False, per_row=False, random=True)
    learning_rate = LearningRate(5e-4, "CSerxy/IDPG@691b282, IDPG-PHM.sh", on="RoBERTa-large, RTE", optimizer="Adam")
    target = "stack"

    def inject(self, model: nn.Module, config: IDPGConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.sequence(site, IDPGOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: IDPGConfig) -> int:
        d, h, n = site.out_features, config.hidden, config.phm
        outputs = config.length * d
        if n is None:
            return (d + 1) * h + (h + 1) * outputs
        return 2 * n**3 + (d * h + h * outputs) // n + h + outputs
