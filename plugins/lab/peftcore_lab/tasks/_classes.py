"""Helpers for classification tasks: the classes of a trained head, predictions, and accuracy."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import transformers
from torch import Tensor

from peftcore.files.save_load import describe
from peftcore_lab.runs.run import Run

logger = logging.getLogger("peftcore")


def learned(run: Run) -> Sequence[str]:
    """Return the classes of the head in the adapter that a run continues, in the order of their numbers. Return an
    empty sequence if the run begins with a fresh adapter."""
    if run.adapter is None:
        return ()
    found = describe(run.adapter).classes
    if not found:
        logger.warning("%s does not name the classes of its head: the classes of the data are used", run.adapter)
    return found


def predictions(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Return the predicted classes. Hidden states, which some models return in addition to logits, are ignored."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def accuracy(prediction: transformers.EvalPrediction) -> dict[str, float]:
    """Return the share of correct predictions."""
    return {"accuracy": float(np.mean(np.equal(prediction.predictions, prediction.label_ids)))}
