"""The joint loss of labels and of answers in a prompt."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from peftcore.author import Rows

IGNORED = -100
"""Labels that do not count."""


def more_than_labels(answers: Collection[tuple[int, float]], made: Rows, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of labels and answers, in float32 or more, less that of the labels alone, which is
    the loss of a model that predicts the next token.

    Args:
        answers: tokens in the prompt, each with the weight of its loss. Each counts as one label in the mean.
        made: the logits at the rows before each of them, and at the last row, which predicts the first label.
        logits: the model's, ``[batch, tokens, vocabulary]``.
        labels: ``[batch, tokens]`` int64.
    """
    precise = torch.promote_types(logits.dtype, torch.float32)
    logits, scored, labels = logits.to(precise), made.states.to(precise), labels.to(logits.device)
    first = labels.new_zeros(len(labels)) if made.behind is None else made.behind.to(labels)
    first = first[:, None].clamp(max=labels.shape[1] - 1)
    before = logits[:, :-1].flatten(0, 1)  # of what stands before each label but the first
    own = F.cross_entropy(before, labels[:, 1:].flatten(), ignore_index=IGNORED)
    rest = labels.scatter(1, first, IGNORED)[:, 1:].flatten()
    told = labels.new_tensor([token for token, _ in answers]).expand(len(labels), -1)
    told = torch.cat([told, labels.gather(1, first)], 1)
    weights = scored.new_tensor([*(weight for _, weight in answers), 1.0])
    losses = F.cross_entropy(scored.flatten(0, 1), told.flatten(), ignore_index=IGNORED, reduction="none")
    total = F.cross_entropy(before, rest, ignore_index=IGNORED, reduction="sum")
    total = total + (losses.view(told.shape) * weights).sum()
    mean: Tensor = total / (rest.ne(IGNORED).sum() + told.ne(IGNORED).sum()) - own
    return mean
