"""Selection of some tokens of a block: a soft top-k of their scores, and the block's arguments for the chosen
tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftcore.author import cache_in
from peftcore.errors import SequenceError

PADDING = ("src_key_padding_mask", "attention_mask")
"""Arguments that mark padding, or which tokens attend to which. In the first, of torch's layers, True is padding."""
PLACES = ("position_embeddings", "position_ids")
"""Arguments that have an entry for each token."""
START, DECAY = 4.0, 0.7
"""The temperature of the first step, and the factor by which each step multiplies it."""


def soft_top_k(scores: Tensor, k: Tensor, real: Tensor, temperature: float, steps: int) -> Tensor:
    """Return shares of tokens in 0 .. 1 that add up to k: those which maximize ``shares . scores`` and, times the
    temperature, their entropy; found by `steps` of coordinate descent, of which each is colder.

    Args:
        scores: ``[batch, tokens]``.
        k: the number of tokens, ``[batch or 1, 1]``.
        real: which tokens are not padding, ``[batch or 1, tokens]``; the share of padding is 0.
        temperature: the lower bound, which the last steps use.
        steps: the number of steps.
    """
    scores = scores.masked_fill(~real, 0.0)
    a, b, epsilon = torch.zeros_like(scores[:, :1]), -scores, temperature
    for step in range(steps):
        epsilon = max(START * DECAY**step, temperature)
        logits = ((scores + b) / epsilon).masked_fill(~real, -torch.inf)
        a = epsilon * (k.to(scores.dtype).log() - logits.logsumexp(-1, keepdim=True))
        b = -(scores + a).relu()
    shares = ((scores + a + b) / epsilon).exp()
    everyone = k >= real.sum(-1, keepdim=True)  # no step needs to be taken, and none would get there
    return torch.where(everyone, torch.ones_like(shares), shares).masked_fill(~real, 0.0)


def arguments_of(given: Mapping[str, Any], chosen: Tensor, count: int, idle: Tensor | None) -> dict[str, Any]:
    """Return a block's arguments for the chosen tokens.

    Args:
        given: the block's arguments by name, without the states.
        chosen: the indices of the chosen tokens, ``[batch, chosen]``.
        count: how many tokens there are.
        idle: which of the chosen tokens only fill the shape and are masked for all tokens, ``[batch, chosen]``; None
            without padding information.

    Raises:
        SequenceError: it is unknown how to cut an argument, or how to mask tokens.
    """
    if cache_in(given) is not None or given.get("is_causal") or given.get("src_mask") is not None:
        raise SequenceError(
            "this block is given a cache, or a mask by which tokens see only some others: tokens that come later would "
            "decide which ones go through it"
        )
    found = {name: _cut(name, value, chosen, count) for name, value in given.items()}
    if idle is not None:
        name = next((name for name in PADDING if found.get(name) is not None), None)
        if name is not None:
            found[name] = _hiding(found[name], idle, padding=name == PADDING[0])
        elif not torch.compiler.is_compiling() and idle.any():  # hosts leave a mask out that hides nothing
            raise SequenceError("the batch has padding, of which the block is not told")
    return found


def _cut(name: str, value: Any, chosen: Tensor, count: int) -> Any:
    if isinstance(value, tuple | list) and name in PLACES:
        return type(value)(_cut(name, each, chosen, count) for each in value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        if name in PLACES or (name in PADDING and value.dim() == 2):
            return _rows(value, chosen)
        if name in PADDING and value.dim() == 4 and value.shape[-1] == count:
            keys = _rows(value.movedim(-1, 1), chosen).movedim(1, -1)  # [batch, heads, tokens or 1, chosen]
            return keys if value.shape[-2] == 1 else _rows(keys.movedim(-2, 1), chosen).movedim(1, -2)
        if count not in value.shape[1:]:
            return value
    elif not any(isinstance(each, Tensor) for each in _inside(value)):
        return value
    raise SequenceError(f"nobody knows how to cut {name} ({type(value).__name__}) for the chosen tokens")


def _inside(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, tuple | list) else [torch.empty(0)]


def _rows(value: Tensor, chosen: Tensor) -> Tensor:
    """Return the entries of the chosen tokens of ``[batch or 1, tokens, ...]``."""
    index = chosen.view(*chosen.shape, *[1] * (value.dim() - 2))
    return value.expand(len(chosen), *value.shape[1:]).gather(1, index.expand(*chosen.shape, *value.shape[2:]))


def _hiding(mask: Tensor, idle: Tensor, padding: bool) -> Tensor:
    """Return a mask that hides the idle tokens too."""
    hidden = idle if mask.dim() == 2 else idle[:, None, None, :]
    if mask.is_floating_point():
        return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
    return mask | hidden if padding else mask.masked_fill(hidden, 0)
