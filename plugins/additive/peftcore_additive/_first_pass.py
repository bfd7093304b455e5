"""Computes a summary of each text in a separate pass: the state of its first token, or in causal stacks of its last
token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftcore.author import InstanceOperator, forward_context


class Summary(NamedTuple):
    """The result of one pass over the texts of a batch."""

    state: Tensor
    """The state of one token of each text, ``[batch, width]``, without gradients."""
    at: Tensor
    """``[batch]``: the position of that token in each text."""

    def same(self, states: Tensor) -> Tensor:
        """Return the states of the same tokens in another pass, ``[batch, width]``. `states` contains all states of
        that pass, ``[batch, tokens, width]``."""
        return of(states, self.at)


def first_pass(operator: InstanceOperator, call: Callable[..., Any], given: Mapping[str, Any], text: Tensor) -> Summary:
    """Run the stack without the adapter, and return the state of each text's first token, or in a causal stack of its
    last token."""
    with torch.no_grad():
        output = forward_context().without(operator, call, **given)
    states = output if isinstance(output, Tensor) else output[0]  # [batch, tokens, width]
    at = text.int().argmax(-1)
    if operator.stack.causal:
        at = text.shape[1] - 1 - text.flip(-1).int().argmax(-1)
    return Summary(of(states.detach(), at), at)


def of(states: Tensor, at: Tensor) -> Tensor:
    """Return the states ``[batch, width]`` of the tokens at positions `at` ``[batch]``, from ``[batch, tokens,
    width]``."""
    return states[torch.arange(len(states), device=states.device), at]
