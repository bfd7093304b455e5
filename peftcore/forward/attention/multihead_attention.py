"""Edits (operators inside attention) in torch's `nn.MultiheadAttention`, whose forward computes attention in one or two
fused functions.

This file reimplements that forward. Inputs, masks and outputs are the same as in torch's documentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftcore.errors import UnsupportedSite
from peftcore.forward.attention.attention import HostAttention, run_edits
from peftcore.forward.state.slot import Edits


@dataclass(frozen=True)
class MultiheadCalls:
    """Makes edits (operators inside attention) act in modules that use the forward of `nn.MultiheadAttention`."""

    view_class: ClassVar[None] = None

    def check(self, path: str, module: Any) -> None:
        """Raise UnsupportedSite if the module itself adds keys to the softmax."""
        if module.bias_k is not None or module.add_zero_attn:
            raise UnsupportedSite(
                f"{path} adds keys of its own (add_bias_kv or add_zero_attn), which operators inside attention do not "
                "support: exclude it from the adapter's target modules"
            )

    def prepare(self) -> None:
        """Does nothing: these edits (operators inside attention) need no preparation."""

    def attributes(self, module: nn.Module, edits: Edits) -> Mapping[str, Any]:
        """Returns an empty mapping: the view keeps all attributes."""
        return {}

    def run(self, stand_in: nn.Module, edits: Edits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the output and the attention weights, as `nn.MultiheadAttention.forward` does; the weights are None
        if they were not requested."""
        return _forward(stand_in, edits, *args, **kwargs)


def _forward(
    module: Any,
    edits: Edits,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    batched = query.dim() == 3
    turned = batched and not module.batch_first

    def heads(states: Tensor, part: int) -> Tensor:
        """``[batch, length, in]`` -> ``[batch, heads, length, head_dim]``"""
        states = states.transpose(0, 1) if turned else states if batched else states[None]
        made = F.linear(states, _weight(module, part), _bias(module, part))
        return made.reshape(*made.shape[:2], module.num_heads, -1).transpose(1, 2)

    q, k, v = heads(query, 0), heads(key, 1), heads(value, 2)
    if is_causal and attn_mask is None:
        attn_mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    options = {"dropout": module.dropout if module.training else 0.0}
    mask = _visible(attn_mask, key_padding_mask, q)
    function = _with_weights if need_weights else _fused
    host = HostAttention(module, function, False, k, mask, options, edits.route is not None)
    output, weights = run_edits(edits, host, q, k, v)
    output = F.linear(output.transpose(1, 2).flatten(2), module.out_proj.weight, module.out_proj.bias)
    if weights is not None:
        weights = weights.mean(dim=1) if average_attn_weights else weights
        weights = weights if batched else weights[0]
    return output.transpose(0, 1) if turned else output if batched else output[0], weights


def _weight(module: Any, part: int) -> Tensor:
    if module.in_proj_weight is None:
        separate: Tensor = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)[part]
        return separate
    together: Tensor = module.in_proj_weight
    return together.chunk(3)[part]


def _bias(module: Any, part: int) -> Tensor | None:
    bias: Tensor | None = module.in_proj_bias
    return None if bias is None else bias.chunk(3)[part]


def _visible(attn_mask: Tensor | None, padding: Tensor | None, query: Tensor) -> Tensor | None:
    """Returns one mask ``[batch or 1, heads or 1, queries or 1, keys]`` that combines the two masks of
    `nn.MultiheadAttention`. If both are boolean, it is True where a key is visible; otherwise its numbers are added to
    the scores."""
    batch, heads = query.shape[:2]
    masks = []
    if attn_mask is not None:
        apart = attn_mask.reshape(batch, heads, *attn_mask.shape[1:]) if attn_mask.dim() == 3 else attn_mask[None, None]
        masks.append(apart)
    if padding is not None:
        masks.append((padding if padding.dim() == 2 else padding[None])[:, None, None])
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):
        hidden = masks[0] if len(masks) == 1 else masks[0] | masks[1]
        return ~hidden
    added = [
        torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask, float("-inf")) if mask.dtype == torch.bool else mask
        for mask in masks
    ]
    return sum(added[1:], added[0])


def _fused(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, **_: Any
) -> tuple[Tensor, None]:
    return F.scaled_dot_product_attention(query, key, value, mask, dropout).transpose(1, 2), None


def _with_weights(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, **_: Any
) -> tuple[Tensor, Tensor]:
    scores = query @ key.mT / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = F.dropout(scores.softmax(dim=-1), dropout)
    return (weights @ value).transpose(1, 2), weights
