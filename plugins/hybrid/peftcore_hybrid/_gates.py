"""Gates that depend on the input, for each token or for a row of tokens; a gated adapter and a gated update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from peftcore.author import Operator, Site, Tap, forward_context
from peftcore.errors import MissingContext, UnsupportedSite
from peftcore_additive import pfeiffer_adapter
from peftcore_additive.pfeiffer_adapter import PfeifferOperator, Placement

Each = Literal["token", "sequence"]
"""The scope of a gate: one token, or the whole sequence."""


class Gate(nn.Module):
    """A gate sigmoid(u . x + c): ``[rows, tokens, 1]``, or its mean over the tokens, ``[rows, 1, 1]``, where it is one
    for the sequence."""

    def __init__(self, width: int, each: Each) -> None:
        super().__init__()
        self.linear = linear(width, 1)
        self.sequence = each == "sequence"

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.linear.weight.to(x.dtype), self.linear.bias.to(x.dtype)
        gate = torch.sigmoid(nn.functional.linear(x, weight, bias))
        return mean_of_tokens(gate) if self.sequence else gate


def linear(width: int, outputs: int) -> nn.Linear:
    """Make a linear layer with BERT's initialization and a bias of zeros."""
    made = nn.Linear(width, outputs)
    start_as_bert(made)
    return made


def start_as_bert(module: nn.Module) -> None:
    """Initialize a linear layer or an embedding like BERT: N(0, 0.02), with a bias of zeros."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def mean_of_tokens(values: Tensor) -> Tensor:
    """Return the mean of ``[rows, tokens, 1]`` over the tokens that are not padding, by the model's `attention_mask`.

    Raises:
        MissingContext: a part of the host was called by itself, so the padding is unknown.
    """
    inputs = forward_context().inputs
    if not inputs or values.dim() != 3:
        raise MissingContext(
            "a gate for the sequence needs rows of tokens, and to know which are padding: call the host itself, or "
            'choose gate="token"'
        )
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != values.shape[:2]:
        return values.mean(1, keepdim=True)
    real = mask.to(values.dtype).unsqueeze(-1)
    return (values * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1)


class GatedLoRA(Operator):
    """The gated update of queries or values; at queries also the gate of the prefix, which reads the same input."""

    padded = frozenset({"A", "B"})

    def __init__(self, site: Site, rank: int, each: Each, prefix: Tap | None) -> None:
        super().__init__(site)
        if each == "sequence":
            site.check_rows_first()
        bound = site.in_features**-0.5
        self.A = nn.Parameter(torch.empty(rank, site.in_features).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(site.out_features, rank))
        self.gate = Gate(site.in_features, each)
        self.prefix = prefix
        self.prefix_gate = None if prefix is None else Gate(site.in_features, each)

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        if self.prefix is not None and self.prefix_gate is not None:
            self.prefix.put(self.prefix_gate(x))
        y = call(x)
        A, B, gate = self.cast(y, self.A, self.B, self.gate(x))
        return self.layer.add(y, self.layer.apply(x, A) * gate, B, 1.0)


class GatedAdapter(PfeifferOperator):
    """A bottleneck behind a gate: g (W_up relu(W_down u + b_down) + b_up) is added to the stream, where u is the
    adapter's input; with the placement "branch" it is added to the site's output."""

    def __init__(self, site: Site, bottleneck: int, gate: Each, placement: Placement) -> None:
        super().__init__(site, pfeiffer_adapter.PfeifferAdapterConfig(bottleneck=bottleneck), placement)
        if self.layer.channel_dim != -1:
            raise UnsupportedSite(f"{site.path}: a bottleneck adapter needs features in the last dimension")
        if gate == "sequence":
            site.check_rows_first()
        self.gate = Gate(site.out_features, gate)

    def added(self, u: Tensor) -> Tensor:
        return self.gate(u).to(u.dtype) * super().added(u)
