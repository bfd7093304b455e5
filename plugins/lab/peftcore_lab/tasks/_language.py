"""Metrics of language tasks: cross-entropy of tokens, and perplexity."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from peftcore_lab.tasks.task import IGNORED


def costs(scores: Tensor, labels: Tensor) -> Tensor:
    """Return for each row the summed cross-entropy of its tokens and the number of tokens that count, [rows, 2]. Sums
    are returned because means of batches would weight tokens unequally."""
    each = nn.functional.cross_entropy(scores.transpose(1, 2).float(), labels, ignore_index=IGNORED, reduction="none")
    return torch.stack([each.double().sum(1), (labels != IGNORED).double().sum(1)], dim=1)


def perplexity(found: Any) -> dict[str, float]:
    """Return the perplexity over all tokens that count."""
    total, count = found.predictions.sum(0)
    return {"perplexity": math.exp(min(total / max(count, 1), 700))}
