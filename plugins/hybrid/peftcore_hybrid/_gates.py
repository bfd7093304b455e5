"""Gates that depend on the input, for each token or for a row of tokens, and a bottleneck adapter behind one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftcore import Operator, Site, forward_context, on_first
from peftcore.errors import MissingContext, UnsupportedSite

Each = Literal["token", "sequence"]
"""The unit that has a gate of its own."""


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
    """Make a linear layer that starts as BERT's own do, with a bias of zeros."""
    made = nn.Linear(width, outputs)
    nn.init.normal_(made.weight, std=0.02)
    nn.init.zeros_(made.bias)
    return made


def mean_of_tokens(values: Tensor) -> Tensor:
    """Return the mean of ``[rows, tokens, 1]`` over the tokens that are no padding, by the model's `attention_mask`.

    Raises:
        MissingContext: a part of the host was called by itself, so nobody knows what is padding.
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


class GatedAdapter(Operator):
    """A bottleneck behind a gate: h + g (W_up relu(W_down h + b_down) + b_up), where h is what the site returns."""

    def __init__(self, site: Site, bottleneck: int, gate: Each) -> None:
        super().__init__(site)
        if self.layer.channel_dim != -1:
            raise UnsupportedSite(f"{site.path}: a bottleneck adapter needs features in the last dimension")
        self.down = linear(site.out_features, bottleneck)
        self.up = linear(bottleneck, site.out_features)
        self.gate = Gate(site.out_features, gate)

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return on_first(call(*args, **kwargs), self._adapt)

    def _adapt(self, h: Tensor) -> Tensor:
        inner = torch.relu(nn.functional.linear(h, *self.cast(h, self.down.weight, self.down.bias)))  # [..., r]
        up = nn.functional.linear(inner, *self.cast(h, self.up.weight, self.up.bias))
        return h + self.gate(h).to(h.dtype) * up
