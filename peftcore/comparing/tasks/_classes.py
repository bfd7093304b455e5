"""Metrics of tasks of classes: the predicted class, and how often it is right."""

from __future__ import annotations

import numpy as np
import transformers
from torch import Tensor


def predictions(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Return the predicted class alone: some models return hidden states beside their logits."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def accuracy(prediction: transformers.EvalPrediction) -> dict[str, float]:
    """Return the share of right answers."""
    return {"accuracy": float(np.mean(np.equal(prediction.predictions, prediction.label_ids)))}
