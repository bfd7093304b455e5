"""The loss of a guest network by itself: what the model's head makes of it, or a head of its own, against the labels.

Heads of language models are the model's own, frozen or adapted as they are. Those that classify are copied, and train.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftcore import Operator, Shared, Site, Tap, forward_context

IGNORED = -100
"""Labels that do not count."""


class GuestLoss(Operator):
    """Adds the guest's own loss in training, where labels are given; stands around the head."""

    def __init__(self, site: Site, states: Tap, weight: float, head: Shared | None) -> None:
        super().__init__(site)
        self.states, self.weight, self.head = states, weight, head

    def forward(self, call: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        context = forward_context()
        states, labels = self.states.get(), context.inputs.get("labels")
        if self.training and self.weight and states is not None and isinstance(labels, Tensor):
            if self.head is None:
                loss = next_token_loss(call(states.to(x.dtype)), labels)
            else:
                pooled = last_token(states, context.inputs.get("attention_mask"))
                loss = class_loss(self.head.module(pooled.to(next(self.head.module.parameters()).dtype)), labels)
            context.add_loss(self.weight * loss)
        return call(x, *args, **kwargs)


def copied(head: nn.Linear) -> nn.Linear:
    """Return a head like another one, with its values, which trains; its values alone where they are there."""
    own = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None)
    values = {name: copy.deepcopy(each.detach()) for name, each in head._parameters.items() if each is not None}
    if not any(each.is_meta for each in (*values.values(), own.weight)):
        own.load_state_dict(values)
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
    """Return the loss of logits ``[batch, classes]``: of a number, of one class, or of several."""
    precise, labels = torch.promote_types(logits.dtype, torch.float32), labels.to(logits.device)
    if logits.shape[-1] == 1:
        return F.mse_loss(logits.squeeze(-1).to(precise), labels.to(precise).view(-1))
    if not labels.is_floating_point():
        return F.cross_entropy(logits.to(precise), labels.view(-1))
    return F.binary_cross_entropy_with_logits(logits.to(precise), labels.to(precise))
