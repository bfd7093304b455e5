"""LPT: late prompt tuning.   Liu et al. 2022, arXiv 2210.11292 (code: xyltt/LPT).

Equation:
    h_m -> [P ; h_m]   before block m,   P = G(h_m) [length, d]

Blocks below m are unchanged, and no gradient passes through them. G generates the prompt from their output h_m:

    naive      P = reshape(W_2 relu(W_1 h + b_1) + b_2),   h one token: W_1 [hidden, d], W_2 [length d, hidden]
    average    P_i = W_2 relu(mean of W_1 h + b_1 over the i-th of `length` windows of tokens) + b_2,   W_2 [d, hidden]
    max        the same with the largest of each window

With None P trains directly. In encoders h is the state of the first token. In decoders it is the state of the prompt's
last token; there the rows of P do not attend to tokens, but tokens attend to all rows. Windows are those of adaptive
pooling, over the tokens of the prompt without padding. If a model adds positions to embeddings, tokens keep their
positions and P does not have any, as in the authors' code. In models with rotary positions, the positions of P precede
that of the first token.

In a decoder P is computed from the whole prompt, and earlier tokens of the prompt attend to it too. The prompt ends
before the first label, or has the length that ``peftcore.call(model, prompt_length=...)`` sets. Calls without both are
refused. P is computed once and then read from the cache. In encoder-decoder models P is inserted in the encoder.

Parameters: (d + 1) hidden + (hidden + 1) length d for "naive", (d + 1) hidden + (hidden + 1) d for "average" and "max",
length * d for None.

Start: The generator starts as torch's linear layers, a directly trained P from N(0, 1). No start is an identity.

Differs from the authors' code: The authors' decoder leaves the last token of the prompt out of its windows. In their
code the dropout of the host's embeddings acts on P; set `dropout` to its value.

Use it: `peftcore.apply(model, "lpt")`, for classification where training time and memory count: backward ends at block
m. Not for long generated text, where a prompt in every layer is better (prefix_tuning), nor to route rows of one batch
to several adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    InnerRows,
    LearningRate,
    Method,
    MethodConfig,
    PromptPositions,
    SequenceSite,
    Share,
    Site,
    Surgeon,
    Tags,
    forward_context,
    full_precision,
)
from peftcore.errors import MissingContext, SequenceError, UnsupportedSite

ALL = 2**31
"""A number larger than the length of any prompt."""


class LPTConfig(MethodConfig):
    """Options of LPT."""

    method: Literal["lpt"] = "lpt"
    length: PositiveInt = 5
    """Number of rows of the prompt."""
    layer: NonNegativeInt | None = None
    """The number of the block before which the prompt is inserted; None takes the middle block."""
    generator: Literal["naive", "average", "max"] | None = "naive"
    """The network that generates the prompt: from one token, or from the means or maxima over windows of all tokens;
    None trains the prompt directly, from N(0, 1)."""
    hidden: PositiveInt = 128
    """Width of the generator's hidden layer."""
    dropout: Share = 0.1
    """Dropout probability of a generated prompt's entries in training."""


class LPTOperator(InnerRows):
    """The prompt that is inserted before one block of an encoder or decoder."""

    def __init__(self, site: SequenceSite, config: LPTConfig) -> None:
        super().__init__(site, config.length)
        self.generator, width = config.generator, self.width
        self.causal = site.stack.causal
        if self.generator is None:
            self.prompt = nn.Parameter(torch.randn(config.length, width))
            return
        generates = self.causal and not site.stack.readers
        # `last` is 1, since where the prompt ends counts.
        self.positions = PromptPositions(self.depths[0], generates, ALL, 1, halves=False, whole=True)
        self.down = nn.Linear(width, config.hidden)
        self.up = nn.Linear(config.hidden, width * (config.length if self.generator == "naive" else 1))
        self.dropout = nn.Dropout(config.dropout)

    def rows_at(self, depth: int, states: Tensor, rows: Tensor, given: Mapping[str, Any]) -> Tensor:
        """Return the rows of each text.

        Raises:
            MissingContext: the end of the text's prompt is unknown.
            SequenceError: the prompt is split over several calls.
        """
        if self.generator is None:
            return self.prompt
        self.check_here(self.down.weight, states)
        chosen = self._chosen(states, given)
        with full_precision(states):
            x = states.to(self.down.weight.dtype)
            if self.generator == "naive":
                one = chosen & (chosen.cumsum(-1) == (chosen.sum(-1, keepdim=True) if self.causal else 1))
                x = x[torch.arange(len(x), device=x.device), one.int().argmax(-1)]
                return self.dropout(self.up(self.down(x).relu()).unflatten(-1, (self.length, -1)))
            return self.dropout(self.up(self._pooled(self.down(x), chosen).relu()))

    def going_on(self, depth: int, states: Tensor, given: Mapping[str, Any]) -> None:
        told = forward_context().context.get("prompt_length")
        if self.generator is not None and told is None:  # raises where more of the prompt may have come
            self.positions.positions(states, given, self.training)

    def _chosen(self, states: Tensor, given: Mapping[str, Any]) -> Tensor:
        """Return which tokens belong to the prompt, ``[batch, tokens]``."""
        running, batch = forward_context(), states.shape[:2]
        told, labels = running.context.get("prompt_length"), running.inputs.get("labels")
        if isinstance(told, int) and self.causal and told > batch[1]:
            raise SequenceError(
                f"this call has {batch[1]} tokens, but the prompt has prompt_length={told}; pass the whole prompt in "
                "one call"
            )
        found = self.positions.positions(states, given, self.training)
        every = torch.ones(batch, dtype=torch.bool, device=states.device)
        chosen = found[0].logical_or(found[1]).expand(batch) if found else every
        whole = told is None and self.positions.generates and isinstance(labels, Tensor) and labels.shape == batch
        if whole and not torch.compiler.is_compiling() and bool((chosen & (labels != -100)).any()):
            raise MissingContext(
                "labels cover the first token, so a prompt generated from these tokens would contain the answer: "
                "label the prompt -100, or pass its length: with peftcore.call(model, prompt_length=...): ..."
            )
        return chosen

    def _pooled(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Return the mean, or the maximum, of each window of the chosen tokens: ``[batch, length, hidden]``, from x
        ``[batch, tokens, hidden]``."""
        place, count = chosen.cumsum(-1) - 1, chosen.sum(-1, keepdim=True)
        made = []
        for i in range(self.length):
            start, stop = i * count // self.length, -(-(i + 1) * count // self.length)
            window = (chosen & (place >= start) & (place < stop))[..., None]
            if self.generator == "max":
                made.append(x.masked_fill(~window, -torch.inf).amax(1))
            else:
                made.append(x.masked_fill(~window, 0).sum(1) / (stop - start).clamp(min=1))
        return torch.stack(made, 1)


class LPT(Method):
    """A prompt that a small network generates from the input, in front of the tokens from a middle block on.

    Example:
        injection = peftcore.apply(model, "lpt")
        peftcore.call(model, prompt_length=3)  # the prompt has 3 tokens; or pass labels, -100 for the prompt
    """

    name = "lpt"
    Config = LPTConfig
    tags = Tags(category="additive", paper="2210.11292", identity_at_init=False, per_row=False, random=True)
    learning_rate = LearningRate(
        1e-3, "xyltt/LPT@634c7b2, encoder-only/run_roberta.sh", on="RoBERTa-large, RTE with 100 examples"
    )
    target = "stack"

    def inject(self, model: nn.Module, config: LPTConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            stack = surgeon.sequence_site(site)
            if stack.stack.reads:
                raise UnsupportedSite(f"{stack.path} reads an encoder's output of the prompt; target the encoder")
            own = config.at(stack.path)
            layer = surgeon.blocks_of(site) // 2 if own.layer is None else own.layer
            surgeon.sequence(site, LPTOperator, config, blocks=[layer])

    @staticmethod
    def parameter_count(site: Site, config: LPTConfig) -> int:
        if not isinstance(site, SequenceSite):
            return 0  # attentions that hide the rows
        d, h, k = site.out_features, config.hidden, config.length
        if config.generator is None:
            return k * d
        return (d + 1) * h + (h + 1) * (k * d if config.generator == "naive" else d)
