"""The divergence of a model's logits in two passes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftcore.errors import TrainingError


def logits_of(output: Any, labelled: bool) -> Tensor:
    """Return the logits ``[rows, classes]`` or ``[rows, tokens, classes]`` from a model's output.

    Args:
        output: the model's output.
        labelled: whether the model was given labels, so that a tuple begins with its loss.

    Raises:
        TrainingError: the output lacks logits of these shapes.
    """
    found = output.get("logits") if isinstance(output, Mapping) else output
    if isinstance(found, tuple) and len(found) > labelled:
        found = found[labelled]
    if not isinstance(found, Tensor) or found.dim() not in (2, 3):
        raise TrainingError(
            f"adamix compares the logits of two passes, and what this model returns ({type(output).__name__}) has none "
            "[rows, classes] or [rows, tokens, classes]: train the model that has the head, or take consistency=0"
        )
    return found


def symmetric_kl(one: Tensor, other: Tensor) -> Tensor:
    """Return the mean of both divergences between logits ``[..., classes]``, in float32 at least: ``[...]``."""
    precise = torch.promote_types(one.dtype, torch.float32)
    p, q = one.to(precise).log_softmax(-1), other.to(precise).log_softmax(-1)
    return 0.5 * (_kl(p.detach(), q) + _kl(q.detach(), p)).sum(-1)


def _kl(target: Tensor, log_probabilities: Tensor) -> Tensor:
    return target.exp() * (target - log_probabilities)
