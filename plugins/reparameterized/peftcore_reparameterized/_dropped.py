"""Dropout of the change that a method makes to a weight, as in LyCORIS and peft: of single outputs, of blocks, or of
the whole change.

Unlike in dropout of activations, one mask is used for the whole batch. It is drawn on the CPU, because gradient
checkpointing always restores the CPU's random generator. It restores the generators of other devices only if it can
detect which devices are in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftcore.author import WeightOperator


@dataclass(frozen=True)
class ChangeDropout:
    """Dropout, in training, of the change that a method adds to a weight."""

    outputs: float = 0.0
    """Probability that the change is dropped for an output."""
    whole: float = 0.0
    """Probability that the change is dropped for all outputs together."""
    rescales: bool = False
    """Whether the kept outputs are divided by their share, which preserves the mean over outputs."""

    def __bool__(self) -> bool:
        return self.outputs > 0 or self.whole > 0

    def shares(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return the factor of the change for each output, ``[*batch, out]``, drawn at random. It is 0 for dropped
        outputs."""
        shares = torch.ones(shape, device=like.device, dtype=like.dtype)
        if self.whole:
            shares = shares * _kept((1,), self.whole, like)
        if self.outputs:
            kept = _kept(shape, self.outputs, like)
            if self.rescales:
                kept = kept / kept.mean(-1, keepdim=True).clamp(min=1 / kept.shape[-1])
            shares = shares * kept
        return shares


class DropsChange(WeightOperator):
    """An operator with dropout of its change to the weight, which `drops` configures."""

    training_only = frozenset({"drops"})
    drops: ChangeDropout

    def drop_nothing(self) -> bool:
        self.drops = ChangeDropout()
        return True


def with_shares(change: Tensor, drops: ChangeDropout, batch_dims: int, training: bool) -> Tensor:
    """Return a change of a weight ``[*batch, out, ...]`` scaled by the drawn share of each output, in training."""
    if not (training and drops):
        return change
    shares = drops.shares(change.shape[: batch_dims + 1], change)
    return change * shares.view(*shares.shape, *[1] * (change.dim() - shares.dim()))


def _kept(shape: Sequence[int], probability: float, like: Tensor) -> Tensor:
    kept = torch.rand(*shape, device="cpu", dtype=torch.float32) > probability
    return kept.to(like.device, like.dtype)


def replaced_blocks(share: float, blocks: int, device: torch.device) -> Tensor:
    """Return a random mask [blocks] of the blocks to replace. Their number is always ``share * blocks``, rounded
    down."""
    return (torch.randperm(blocks, device="cpu") < int(share * blocks)).to(device)
