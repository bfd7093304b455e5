"""P-tuning: a prompt that a small network generates.   Liu et al. 2021, arXiv 2103.10385.

Equation:
    X' = [P ; E(ids)],   P = f(Z),   Z [length, d] trained

f is a multilayer perceptron, Linear(d, h) relu Linear(h, h) relu Linear(h, d), or a two-layer bidirectional LSTM of
width h in each direction followed by Linear(2h, 2h) relu Linear(2h, d). P is put in front of the tokens exactly as in
`prompt_tuning`. Each forward computes P again, in the dtype of the network.

With ``encoder="residual"`` it is residual prompt tuning (Razdaibiedina et al. 2023, arXiv 2305.03937; code
arazd/ResidualPrompts), f(Z) = Z + LayerNorm(Linear(relu(Linear(Z)))) with inner width h. Its authors train Z and f with
one learning rate, 0.3.

Parameters, in addition to length * d: (d + 1) h + (h + 1) h + (h + 1) d for the perceptron; 2 (4 h (d + h) + 8 h) and 2
(4 h (2h + h) + 8 h) for the layers of the LSTM, (2h + 1) 2h + (2h + 1) d for its head; (d + 1) h + (h + 1) d + 2 d for
the residual network.

Start: Z starts from a standard normal distribution, the network as torch initializes it. No start is an identity. With
``encoder="residual"`` Z starts as embeddings of tokens drawn from the vocabulary.

Differs from the authors' code: The authors' code for LAMA (THUDM/P-tuning) uses the LSTM with h = d / 2. No other
difference is known.

Use it: `peftcore.apply(model, "p_tuning")`, where `prompt_tuning` trains unsteadily; the network makes the rows depend
on each other. If P should remain near word embeddings, use the residual network.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    LearningRate,
    Method,
    MethodConfig,
    SequenceOperator,
    SequenceSite,
    Share,
    Site,
    Surgeon,
    Tags,
    full_precision,
)
from peftcore_additive._rows import embedded_tokens


class PTuningConfig(MethodConfig):
    """Options of P-tuning."""

    method: Literal["p_tuning"] = "p_tuning"
    length: PositiveInt = 20
    """Number of rows of the prompt."""
    encoder: Literal["mlp", "lstm", "residual"] = "mlp"
    """The network that generates the prompt: a perceptron ("mlp"), the paper's bidirectional LSTM ("lstm"), or a
    perceptron with a norm whose output is added to its trained inputs ("residual")."""
    hidden: PositiveInt | None = None
    """Width h of the network; None: the width of the embeddings."""
    lstm_dropout: Share = 0.0
    """Probability of dropout between the two layers of the LSTM, in training."""


class PTuningOperator(SequenceOperator):
    """The prompt of one encoder or decoder, and the network that generates it."""

    def __init__(self, site: SequenceSite, config: PTuningConfig) -> None:
        super().__init__(site, config.length)
        width, hidden = self.width, config.hidden or self.width
        self.residual, self.lstm = config.encoder == "residual", None
        start = torch.randn(config.length, width)
        if self.residual:
            start = embedded_tokens(site, config.length)
        self.start = nn.Parameter(start)
        if config.encoder == "lstm":
            self.lstm = nn.LSTM(
                width, hidden, num_layers=2, bidirectional=True, batch_first=True, dropout=config.lstm_dropout
            )
            self.head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width))
        elif self.residual:
            self.head = nn.Sequential(
                nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width), nn.LayerNorm(width)
            )
        else:
            layers = [nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
            self.head = nn.Sequential(*layers, nn.Linear(hidden, width))

    def rows(self, embeds: Tensor) -> Tensor:
        with full_precision(embeds):
            made = self.start if self.lstm is None else self.lstm(self.start[None])[0][0]
            rows: Tensor = self.head(made)
            return self.start + rows if self.residual else rows


class PTuning(Method):
    """A prompt that a small network generates, in front of the embedded tokens."""

    name = "p_tuning"
    Config = PTuningConfig
    tags = Tags(category="additive", paper="2103.10385", identity_at_init=False, per_row=False)
    learning_rate = LearningRate(
        1e-4, "THUDM/P-tuning@f4225d4, PT-Fewshot/scripts/boolq_pt_few_shot.sh", on="ALBERT-xxlarge, BoolQ"
    )
    target = "stack"

    def inject(self, model: nn.Module, config: PTuningConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.sequence(site, PTuningOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: PTuningConfig) -> int:
        d = site.out_features
        h = config.hidden or d
        if config.encoder == "mlp":
            return config.length * d + (d + 1) * h + (h + 1) * h + (h + 1) * d
        if config.encoder == "residual":
            return config.length * d + (d + 1) * h + (h + 1) * d + 2 * d
        layers = 2 * (4 * h * (d + h) + 8 * h) + 2 * (4 * h * 3 * h + 8 * h)
        return config.length * d + layers + (2 * h + 1) * 2 * h + (2 * h + 1) * d
