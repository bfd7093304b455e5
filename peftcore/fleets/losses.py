"""The loss of one adapter, computed from its rows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.errors import TrainingError
from peftcore.forward.state.own_losses import IGNORED

Loss = Callable[[Any, Mapping[str, Any]], Tensor]
"""``(output, batch) -> loss``: a scalar, the mean over the tokens or rows that count."""

SHIFTED = "ForCausalLM"
KINDS = {
    SHIFTED,
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForImageClassification",
    "ForVideoClassification",
    "ForAudioClassification",
}
"""Names of the losses in transformers that are computed from logits and labels alone, in the same way for every
model."""


def kind_of(model: nn.Module) -> str | None:
    """Returns the name of the loss of a transformers model, if the name is one of `KINDS`; otherwise None."""
    transformers: Any = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return None
    kind: str | None = model.loss_type
    return kind if kind in KINDS else None


def loss_of(model: nn.Module) -> Loss:
    """Returns a function that computes the loss of a transformers model from some rows of its output and their labels.

    Raises:
        TrainingError: the model is not one of transformers, or computes its loss from more than logits and labels.
    """
    if kind_of(model) is None:
        raise TrainingError(
            f"the loss of a {type(model).__name__} for some rows of its output is not known: pass loss=lambda output, "
            "batch: ..., which returns the mean over these rows"
        )
    given: Any = model

    def loss(output: Any, batch: Mapping[str, Any]) -> Tensor:
        if not isinstance(batch.get("labels"), Tensor):
            raise TrainingError("the model's loss needs batches with 'labels'; add them, or pass loss=...")
        logits, labels = output["logits"], batch["labels"]
        found: Tensor = given.loss_function(
            logits=logits, labels=labels, pooled_logits=logits, vocab_size=logits.shape[-1], config=given.config
        )
        return found

    return loss


def counted(batch: Mapping[str, Any], rows: int, shifted: bool) -> int:
    """Returns the number of items over which the loss of a batch is averaged: the labels that are not ignored, or the
    rows if each row has at most one label.

    Args:
        batch: the batch, with or without "labels".
        rows: the number of rows of the batch.
        shifted: whether each token is predicted from those before it, so that the first one does not count.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() < 2 or labels.is_floating_point():
        return rows
    return int((labels[..., 1:] if shifted else labels).ne(IGNORED).sum())


def shares(counts: list[int], of_tokens: bool) -> list[float]:
    """Returns the share of each batch of a step in the step's loss: proportional to its number of counted tokens if the
    loss is a mean over tokens, otherwise equal shares.
    """
    total = sum(counts)
    if of_tokens and total:
        return [count / total for count in counts]
    return [1 / len(counts)] * len(counts)


def numbers(losses: list[Tensor]) -> list[float]:
    """Returns the values of scalar tensors as numbers, with one synchronization with the device."""
    found: list[float] = torch.stack([each.detach().double() for each in losses]).tolist() if losses else []
    return found
