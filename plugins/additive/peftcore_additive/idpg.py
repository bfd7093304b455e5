"""IDPG: a prompt that a network generates for each text.   Wu et al. 2022, arXiv 2204.04497 (code: CSerxy/IDPG).

Equation:
    X' = [P(x) ; X],   P(x) = W2 gelu(W1 u + b1) + b2,   u what the model itself makes of the text x

X are the embedded tokens. A first pass without the prompt and without gradients computes u [d], the state of the text's
first token, or in causal models of its last token. W1 [h, d] and W2 [length d, h] compute the rows of P from u. With
`phm` (IDPG-PHM) both matrices are sums of Kronecker products, W = (sum_i S_i x V_i)^T, i = 1..n, with S_i [n, n] and
V_i of an n-th of the matrix's rows and columns. In training, dropout acts on u and on the hidden layer.

The text is all tokens before the first label, or the whole input without labels; ``peftcore.call(model,
prompt_length=...)`` sets its length instead. The prompt is computed once, so generated tokens do not change it.

Parameters: (d + 1) h + (h + 1) length d; with `phm` 2 n^3 + (d h + h length d) / n + h + length d.

Start: W1 and W2 start from N(0, 0.02) and b at zero; with `phm` all factors and b1 start from N(0, 0.05), b2 uniform in
+-0.5. No start is an identity.

Differs from the authors' code: Only the paper's single-layer IDPG is here; the multi-layer version adds another prompt
to the same rows at each layer. The authors insert the rows after the first token, [CLS]; here they are in front of it,
as in all prompt methods.

Use it: `peftcore.apply(model, "idpg")`, where the texts of a task need different prompts. If the second pass takes too
much time, use `smop`, which chooses a prompt by the embeddings alone.
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
    """Number of rows of the prompt."""
    hidden: PositiveInt = 16
    """Width h of the hidden layer of the network that generates the prompt."""
    phm: PositiveInt | None = 16
    """Number n of Kronecker products in each matrix of the network; it must divide the model's width and h. None trains
    full matrices (IDPG-DNN)."""
    dropout: Share = 0.1
    """Probability of dropout in front of both matrices, in training."""


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
    """The network that generates the prompt of one encoder or decoder."""

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
