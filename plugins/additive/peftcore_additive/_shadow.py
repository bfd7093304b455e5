"""The loss of a guest network by itself, from the outputs of the model's head on the guest's states, or of a copy of
that head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftcore.author import Operator, Shared, Site, Tap, forward_context

IGNORED = -100
"""Labels that do not count."""


class GuestLoss(Operator):
    """Wraps the head and adds the guest's own loss in training, where labels are given."""

    def __init__(self, site: Site, states: Tap, weight: float, head: Shared | None) -> None:
        super().__init__(site)
        self.states, self.weight, self.head = states, weight, head

    def forward(self, call: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        context = forward_context()
        states, labels = self.states.get(), context.inputs.get("labels")
        if self.training and self.weight and states is not None and isinstance(labels, Tensor):
            if self.head is None:
                with context.aside():
                    logits = call(states.to(x.dtype))
                loss = next_token_loss(logits, labels)
            else:
                if labels.dim() != 2 or labels.is_floating_point():  # else there is one for each token
                    states = last_token(states, context.inputs.get("attention_mask"))
                loss = class_loss(self.head.module(states.to(next(self.head.module.parameters()).dtype)), labels)
            context.add_loss(self.weight * loss, self)
        return call(x, *args, **kwargs)


def copied(site: Site) -> nn.Linear:
    """Return a head like that at a site, with its values, which trains."""
    biased = site.tensor == "weight" and not site.missing("bias")
    own = nn.Linear(site.in_features, site.out_features, bias=biased)
    if not site.meta and not (weight := site.weight()).is_meta:
        own.weight.data.copy_(weight.detach())
        if biased:
            own.bias.data.copy_(site.at("bias").weight().detach())
    return own


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return how badly logits ``[batch, tokens, vocabulary]`` predict the next labels ``[batch, tokens]``."""
    precise = torch.promote_types(logits.dtype, torch.float32)
    said = labels[:, 1:].flatten().to(logits.device)
    total = F.cross_entropy(logits[:, :-1].flatten(0, 1).to(precise), said, ignore_index=IGNORED, reduction="sum")
    return total / said.ne(IGNORED).sum().clamp(min=1)


def last_token(states: Tensor, mask: Any) -> Tensor:
    """Return the states ``[batch, width]`` of the last tokens that a mask ``[batch, tokens]`` does not hide."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return states[:, -1]
    places = torch.arange(mask.shape[1], device=mask.device)
    last = (mask.ne(0) * places).argmax(-1).to(states.device)
    return states[torch.arange(len(states), device=states.device), last]


def class_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of logits ``[..., classes]``: of a number, of one class, or of several."""
    precise, labels = torch.promote_types(logits.dtype, torch.float32), labels.to(logits.device)
    if logits.shape[-1] == 1:
        return F.mse_loss(logits.squeeze(-1).to(precise), labels.to(precise).view(-1))
    if not labels.is_floating_point():
        return F.cross_entropy(logits.flatten(0, -2).to(precise), labels.flatten(), ignore_index=IGNORED)
    return F.binary_cross_entropy_with_logits(logits.to(precise), labels.to(precise))
