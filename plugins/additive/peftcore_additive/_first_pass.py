"""A summary of each text: the output of the stack in a separate pass, at the first token or, in causal stacks, the last
one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftcore.author import InstanceOperator, forward_context


class Summary(NamedTuple):
    """The result of one pass over the texts of a batch: the state of one token of each text."""

    state: Tensor
    """``[batch, width]``, without gradients."""
    at: Tensor
    """``[batch]``: the positions of the tokens whose states these are."""

    def same(self, states: Tensor) -> Tensor:
        """Return the states ``[batch, width]`` of the same tokens in another pass ``[batch, tokens, width]``."""
        return of(states, self.at)


def first_pass(operator: InstanceOperator, call: Callable[..., Any], given: Mapping[str, Any], text: Tensor) -> Summary:
    """Run the stack without the adapter, and return the states of the texts' first tokens, or in a causal stack of
    their last ones."""
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
