"""The loss of a student whose teacher's predictions are an argument of the call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftcore.errors import ConfigError


def cross_entropy(teacher: Any, output: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Return the mean over tokens of ``-sum p_teacher log p``, in float32 or more; of shape ``[]``, with its graph.

    Args:
        teacher: the teacher's logits ``[batch, tokens, vocabulary]``, or the logarithms of its largest probabilities
            and their tokens, two tensors ``[batch, tokens, k]``. Positions where all of it is -inf do not count.
        output: the student's output, which is or has logits ``[batch, tokens, vocabulary]``.
        inputs: the student's inputs, whose ``attention_mask`` marks padding.

    Raises:
        ConfigError: the shape of the teacher's predictions differs from that of the logits, or the output lacks logits
            of tokens.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else output
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise ConfigError(f"teacher= is for logits [batch, tokens, vocabulary]; a {type(output).__name__} has none")
    largest = not isinstance(teacher, Tensor)
    said, places = teacher if largest else (teacher, None)
    if said.shape[:2] != logits.shape[:2] or (places is None and said.shape != logits.shape):
        raise ConfigError(f"teacher= is {tuple(said.shape)}, and the logits are {tuple(logits.shape)}: of other tokens")
    logs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    said = said.to(logs)
    counts = said.isfinite().any(-1)
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == counts.shape:
        counts = counts & mask.bool()
    said = said.masked_fill(~counts[..., None], 0.0)
    chances = said.softmax(-1) if places is None else said.exp()
    losses = -(chances * (logs if places is None else logs.gather(-1, places.to(logs.device)))).sum(-1)
    mean: Tensor = losses.masked_fill(~counts, 0.0).sum() / counts.sum().clamp(min=1)
    return mean
